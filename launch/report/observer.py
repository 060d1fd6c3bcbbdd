"""The watcher of a run: it hands what the loops report to log, timeline and terminal, and adds speed and wait shares.

loops, teachers --step, evaluation, event, span--> RunObserver --> metrics.jsonl, sinks
                                                              --> timeline.jsonl
                                                              --> Progress
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from launch.report.intervals import Interval, seconds_inside, union
from launch.report.metrics import STUDENT_WAIT, TEACHER_WAIT, TOKENS, TOKENS_PER_S, MetricsLog, SpanKind, Timeline
from launch.report.progress import Progress
from trainer.types import Evaluation, StepMetrics

_WINDOW_STEPS = 10
_KEPT_SPANS = 512


class RunObserver:
    """Implements `trainer.loop.loops.Observer`. Waiting is of the last ten steps, without evaluation and saving."""

    def __init__(
        self,
        *,
        log: MetricsLog,
        timeline: Timeline,
        progress: Progress,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._log = log
        self._timeline = timeline
        self._progress = progress
        self._clock = clock
        self._spans: dict[str, deque[tuple[str, float, float]]] = defaultdict(lambda: deque(maxlen=_KEPT_SPANS))
        self._steps: deque[Interval] = deque(maxlen=_WINDOW_STEPS)

    def step(self, metrics: StepMetrics) -> None:
        """Adds what the spans say about this step; a loop reports a step's spans before the step."""
        values = dict(metrics.values)
        student = self._spans["student"]
        trained = [(start, stop) for kind, start, stop in student if kind == "train"]
        if trained:
            waited = [(start, stop) for kind, start, stop in student if kind == "wait" and stop <= trained[-1][0]]
            began = min(trained[-1][0], waited[-1][0]) if waited else trained[-1][0]
            if not self._steps or began >= self._steps[-1][1]:
                self._steps.append((began, trained[-1][1]))
            if TOKENS in values:
                values[TOKENS_PER_S] = values[TOKENS] / max(trained[-1][1] - began, 1e-9)
            window = list(self._steps)
            values[STUDENT_WAIT] = 1.0 - seconds_inside(trained, window) / _length(window)
            teacher = self._teacher_wait(window)
            if teacher is not None:
                values[TEACHER_WAIT] = teacher
        metrics = StepMetrics(step=metrics.step, values=values)
        self._log.step(metrics)
        self._progress.step(metrics)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._log.evaluation(evaluation)
        before = self._log.first_evaluation
        if before is not None and before is not evaluation:
            self._progress.compare_with(before)
        self._progress.evaluation(evaluation, first=before is evaluation)

    def event(self, name: str, **fields: Any) -> None:
        """Logged, and shown as a line: whatever is an event is rare."""
        self._log.event(name, **fields)
        details = ", ".join(f"{key} {value}" for key, value in fields.items())
        self._progress.note(f"{name.replace('_', ' ')}: {details}" if details else name.replace("_", " "))

    def span(self, lane: str, kind: SpanKind, start_s: float, stop_s: float, label: str = "") -> None:
        self._timeline.span(lane, kind, start_s, stop_s, label)
        self._spans[lane].append((kind, start_s, stop_s))

    def close(self) -> None:
        self._log.close()
        self._timeline.close()
        self._progress.close()

    def _teacher_wait(self, window: list[Interval]) -> float | None:
        """Mean over the replicas that have worked; None before any has.

        A unit is known when it is finished. Each lane's window therefore ends before the longest of its recent units
        could still be running.
        """
        shares = []
        for lane, spans in self._spans.items():
            busy = [(start, stop) for kind, start, stop in spans if kind in ("score", "write")]
            if lane.startswith("student") or not busy:
                continue
            known_until = max(busy[-1][1], self._clock() - max(stop - start for start, stop in busy))
            known = [(start, min(stop, known_until)) for start, stop in window if start < known_until]
            if _length(known) > 0:
                shares.append(1.0 - seconds_inside(busy, known) / _length(known))
        return sum(shares) / len(shares) if shares else None


def _length(window: list[Interval]) -> float:
    return sum(stop - start for start, stop in union(window))
