"""Everybody who watches a run, behind one observer: what a person hears of."""

from __future__ import annotations

import os
from typing import Any

from configs.secrets import without_secrets
from trainer.metrics import MetricsLog, SpanKind, Timeline
from trainer.observer import RunObserver
from trainer.progress import Progress
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
    "self_test_skipped": "self-tests skipped, as asked",
    "note": "{text}",
}
"""Events that a person hears of, and how."""


class Watch:
    """Implements `trainer.loops.Observer`."""

    def __init__(self, *, metrics: MetricsLog, timeline: Timeline, progress: Progress) -> None:
        self._metrics = metrics
        self._progress = progress
        self._observer = RunObserver(log=metrics, timeline=timeline, progress=progress)

    def step(self, metrics: StepMetrics) -> None:
        self._observer.step(metrics)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._observer.evaluation(evaluation)

    def event(self, name: str, **fields: Any) -> None:
        # texts of libraries, which may hold an address with a password, or worse
        fields = {k: without_secrets(v, environment=os.environ) if isinstance(v, str) else v for k, v in fields.items()}
        if name in ("resumed", "students_restarted"):
            self._metrics.resume(fields["from_step"])
        self._metrics.event(name, **fields)
        if name == "self_test":
            verdict = "passed" if fields["passed"] else "FAILED"
            self._progress.note(f"self-test {verdict}: {fields['test']}: {fields['numbers']}")
        elif name in SPOKEN:
            self._progress.note(SPOKEN[name].format(**fields))

    def span(self, lane: str, kind: SpanKind, start_s: float, stop_s: float, label: str = "") -> None:
        self._observer.span(lane, kind, start_s, stop_s, label)
