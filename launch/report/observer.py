"""The observer of a run: hands every event to the metrics log, the timeline, the terminal and the
run artifacts.

loops, teachers, students --step, evaluation, event, span--> RunObserver --> metrics.jsonl, which trackers follow
                          --phase, generation-->                         --> timeline.jsonl
                                                                         --> Progress
                                                                         --> Record: manifest, samples, generations
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.secrets import without_secrets
from launch.report.hours import Hours
from launch.report.intervals import Interval, seconds_inside, union
from launch.report.metrics import (
    EVALUATION,
    STUDENT_WAIT,
    TEACHER_WAIT,
    TOKENS,
    TOKENS_PER_S,
    MetricsLog,
    SpanKind,
    Timeline,
    evaluation_values,
)
from launch.report.progress import Progress
from trainer.protocols import Moment
from trainer.types import Evaluation, Sequence, StepMetrics

if TYPE_CHECKING:
    from cluster.prometheus import Exported
    from launch.record import Record

SHOWN = {
    "resumed": "resumed after step {from_step}",
    "redispatch": "{what} goes to another replica after attempt {attempt} on {replica} ({error})",
    "teacher_restart": "{replica} is restarted ({reason})",
    "teacher_lost": "{replica} is given up after {restarts} restarts ({reason})",
    "students_lost": "the student group is lost in step {at_step} ({reason})",
    "students_restarted": "the student group goes on after step {from_step}",
    "labels_lost": "the labels of {units} were lost and are scored again",
    "save_failed": "the checkpoint of step {at_step} failed: {error}",
    "non_finite_step": "step {at_step} was skipped: its loss or gradient is not finite",
    "empty_step": "step {at_step} taught nothing: none of its rows and answers could be used",
    "self_test_skipped": "self-tests skipped, as asked",
    "note": "{text}",
}
"""Events that are printed, and how; all are in metrics.jsonl."""

_WINDOW_STEPS = 10
_KEPT_SPANS = 512


class RunObserver:
    """Implements `trainer.protocols.Observer`. A full disk or an unavailable file server is
    reported once and does not end the run; buffered records are written when there is space again."""

    def __init__(
        self,
        *,
        metrics: MetricsLog,
        timeline: Timeline,
        progress: Progress,
        record: Record | None = None,
        exported: Exported | None = None,
        hours: Hours | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`record`: of a run that keeps artifacts; `phase` and `generation` raise where a disk refuses them.
        `exported`: for Prometheus; `hours`: what is left and spent, added to every step."""
        self._record = record
        self._hours = hours
        self._exported = exported
        self._metrics = metrics
        self._timeline = timeline
        self._progress = progress
        self._clock = clock
        self._waits = _Waits(clock)
        self._fails = False
        self.work = 0
        """Pieces of work that were finished so far: a run in which it does not grow gets no further."""
        self.last: dict[str, tuple[str, float]] = {}
        """What each role finished last, and when."""
        self.newest_step: StepMetrics | None = None
        self.newest_evaluation: Evaluation | None = None
        """Of this attempt."""

    def phase(self, text: str) -> None:
        self._finished("run", f"came to: {text}")
        if self._record is not None:
            self._record.phase(text)
        self._progress.phase(text)

    def step(self, metrics: StepMetrics) -> None:
        """Adds speed and wait shares; a loop reports a step's spans before the step."""
        self._finished("steps", f"step {metrics.step}")
        values = {**metrics.values, **self._waits.of_step(metrics.values)}
        if self._hours is not None:
            values |= self._hours.of_step(metrics.step, values)
        metrics = StepMetrics(step=metrics.step, values=values)
        self.newest_step = metrics
        if self._exported is not None:
            self._exported.step(metrics.step, metrics.values)
        with self._reported_once():
            self._metrics.step(metrics)
        self._progress.step(metrics)

    def evaluation(self, evaluation: Evaluation, when: Moment) -> None:
        self._finished("evaluations", f"after step {evaluation.step}")
        self.newest_evaluation = evaluation
        if self._exported is not None:
            self._exported.evaluation({f"{EVALUATION}{k}": v for k, v in evaluation_values(evaluation).items()})
        with self._reported_once():
            self._metrics.evaluation(evaluation)
        first = self._metrics.first_evaluation
        self._progress.evaluation(evaluation, None if first is evaluation else first)
        if self._record is not None:
            with self._reported_once():
                self._record.looked(evaluation)
        if self._record is not None and when != "during" and evaluation.is_finite:
            with self._reported_once():  # the checkpoint of the last step comes after this
                self._record.evaluation(when, evaluation)

    def generation(self, who: str, rows: tuple[Sequence, ...], texts: AbstractSequence[np.ndarray]) -> None:
        self._finished("generations", f"of {who}")
        if self._record is not None:
            self._record.generation(who, rows, texts)

    def event(self, name: str, **fields: Any) -> None:
        """Raises OSError for `resumed` and `students_restarted` alone: steps that cannot be removed from the log would
        be in it twice."""
        # texts of libraries, which may hold an address with a password, or worse
        fields = {k: without_secrets(v, environment=os.environ) if isinstance(v, str) else v for k, v in fields.items()}
        if self._exported is not None:
            self._exported.event(name)
        if name in ("resumed", "students_restarted"):
            self._metrics.resume(fields["from_step"])
        with self._reported_once():
            self._metrics.event(name, **fields)
        if name == "self_test":
            verdict = "passed" if fields["passed"] else "FAILED"
            self._progress.note(f"self-test {verdict}: {fields['test']}: {fields['numbers']}")
        elif name in SHOWN:
            self._progress.note(SHOWN[name].format(**fields))
        else:
            self._progress.detail(f"{name}: {', '.join(f'{key} {value}' for key, value in fields.items())}")

    def span(self, lane: str, kind: SpanKind, start_s: float, stop_s: float, label: str = "") -> None:
        self._finished(lane, f"{kind} {label}".strip())
        self._waits.add(lane, kind, start_s, stop_s)
        if self._hours is not None and lane == "student":
            self._hours.took(kind, stop_s - start_s)
        self._progress.detail(f"{lane}: {kind} {label}, {stop_s - start_s:.3f} s")
        with self._reported_once():
            self._timeline.span(lane, kind, start_s, stop_s, label)

    def close(self) -> None:
        """Close the files; the progress is closed by its creator."""
        if self._exported is not None:
            self._exported.close()
        for file in (self._metrics, self._timeline):
            with self._reported_once():
                file.close()

    def _finished(self, role: str, what: str) -> None:
        self.work += 1
        self.last[role] = (what, self._clock())

    @contextlib.contextmanager
    def _reported_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._fails:
                self._progress.note(f"the run's records cannot be written, and will have a gap: {error}")
            self._fails = True
        else:
            self._fails = False


class _Waits:
    """Speed of a step and wait shares of the last ten steps, evaluation and saving left out, from the newest spans."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._spans: dict[str, deque[tuple[str, float, float]]] = defaultdict(lambda: deque(maxlen=_KEPT_SPANS))
        self._steps: deque[Interval] = deque(maxlen=_WINDOW_STEPS)

    def add(self, lane: str, kind: str, start_s: float, stop_s: float) -> None:
        self._spans[lane].append((kind, start_s, stop_s))

    def of_step(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values to add to those of a step whose spans are known."""
        student = self._spans["student"]
        trained = [(start, stop) for kind, start, stop in student if kind == "train"]
        if not trained:
            return {}
        waited = [(start, stop) for kind, start, stop in student if kind == "wait" and stop <= trained[-1][0]]
        began = min(trained[-1][0], waited[-1][0]) if waited else trained[-1][0]
        if not self._steps or began >= self._steps[-1][1]:
            self._steps.append((began, trained[-1][1]))
        window = list(self._steps)
        found = {STUDENT_WAIT: 1.0 - seconds_inside(trained, window) / _length(window)}
        if TOKENS in values:
            found[TOKENS_PER_S] = values[TOKENS] / max(trained[-1][1] - began, 1e-9)
        teacher = self._of_teachers(window)
        return found if teacher is None else {**found, TEACHER_WAIT: teacher}

    def _of_teachers(self, window: list[Interval]) -> float | None:
        """Mean over the replicas that have worked; None before any has.

        A unit is known when it is finished. Each lane's window therefore ends before the longest of its recent units
        could still be running.
        """
        shares = []
        for lane, spans in self._spans.items():
            busy = [(start, stop) for kind, start, stop in spans if kind in ("score", "generate")]
            if lane.startswith(("student", "rollout")) or not busy:
                continue
            known_until = max(busy[-1][1], self._clock() - max(stop - start for start, stop in busy))
            known = [(start, min(stop, known_until)) for start, stop in window if start < known_until]
            if _length(known) > 0:
                shares.append(1.0 - seconds_inside(busy, known) / _length(known))
        return sum(shares) / len(shares) if shares else None


def _length(window: list[Interval]) -> float:
    return sum(stop - start for start, stop in union(window))
