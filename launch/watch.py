"""Everybody who watches a run, behind one observer: what a person hears of."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from configs.secrets import without_secrets
from launch.report.metrics import MetricsLog, SpanKind, Timeline
from launch.report.observer import RunObserver
from launch.report.progress import Progress
from trainer.types import Evaluation, StepMetrics

SPOKEN = {
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
"""Events that a person hears of, and how."""


class Watch:
    """Implements `trainer.loop.loops.Observer`. A disk that is full, or a file server that is away for a moment, is
    told once and ends nothing; as much as files buffer is written when there is room again."""

    def __init__(self, *, metrics: MetricsLog, timeline: Timeline, progress: Progress) -> None:
        self._metrics = metrics
        self._timeline = timeline
        self._progress = progress
        self._fails = False
        self.work = 0
        """Pieces of work that were finished so far: a run in which it does not grow gets no further."""
        self.last: dict[str, tuple[str, float]] = {}
        """What each role finished last, and when."""
        self._observer = RunObserver(log=metrics, timeline=timeline, progress=progress)

    def phase(self, text: str) -> None:
        self._finished("run", f"came to: {text}")
        self._progress.phase(text)

    def step(self, metrics: StepMetrics) -> None:
        self._finished("steps", f"step {metrics.step}")
        with self._told_once():
            self._observer.step(metrics)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._finished("evaluations", f"after step {evaluation.step}")
        with self._told_once():
            self._observer.evaluation(evaluation)

    def event(self, name: str, **fields: Any) -> None:
        """Raises OSError for `resumed` and `students_restarted` alone: what cannot be removed from the log would stand
        in it twice."""
        # texts of libraries, which may hold an address with a password, or worse
        fields = {k: without_secrets(v, environment=os.environ) if isinstance(v, str) else v for k, v in fields.items()}
        if name in ("resumed", "students_restarted"):
            self._metrics.resume(fields["from_step"])
        with self._told_once():
            self._metrics.event(name, **fields)
        if name == "self_test":
            verdict = "passed" if fields["passed"] else "FAILED"
            self._progress.note(f"self-test {verdict}: {fields['test']}: {fields['numbers']}")
        elif name in SPOKEN:
            self._progress.note(SPOKEN[name].format(**fields))

    def span(self, lane: str, kind: SpanKind, start_s: float, stop_s: float, label: str = "") -> None:
        self._finished(lane, f"{kind} {label}".strip())
        with self._told_once():
            self._observer.span(lane, kind, start_s, stop_s, label)

    def _finished(self, role: str, what: str) -> None:
        self.work += 1
        self.last[role] = (what, time.time())

    def close(self) -> None:
        """Of the files; the progress belongs to whoever made it."""
        for file in (self._metrics, self._timeline):
            with self._told_once():
                file.close()

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._fails:
                self._progress.note(f"the run's records cannot be written, and will have a gap: {error}")
            self._fails = True
        else:
            self._fails = False
