"""What a person sees of `stillhouse label`: one line that changes on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence as AbstractSequence
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.status import Status
from rich.text import Text

from cluster.preflight.machine import size_text
from launch.report.observer import SHOWN
from trainer.loop.job import Job
from trainer.protocols import Moment
from trainer.types import Evaluation, Sequence, StepMetrics, UnitReport

EVERY_S = 10.0


class LabelProgress:
    """Implements `trainer.protocols.Observer`: what a student does never comes here."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._started = time.monotonic()
        self._shown_at = -math.inf
        self._there = self._made = self._tokens = self._bytes = 0
        self._expected: int | None = None
        self._began: float | None = None  # the first unit
        self._status = Status("", console=self._console) if self._console.is_terminal else None

    def expect(self, job: Job) -> None:
        """How many sequences there may be, where the rows say it."""
        rows, drawn = job.rows_per_epoch, job.loop.total_steps * job.loop.sequences_per_step
        self._expected = None if rows is None else min(rows, drawn) + len(job.evaluation)

    def found(self, sequences: int) -> None:
        """Labels that were in the store already."""
        self._there += sequences
        self._show()

    def made(self, sequences: int, report: UnitReport) -> None:
        """A unit whose labels are in the store, or on their way to it."""
        self._began = self._began or time.monotonic() - report.score_s
        self._made += sequences
        self._tokens += report.num_tokens
        self._bytes += report.num_bytes
        self._show()

    @property
    def summary(self) -> str:
        of = f" of about {self._expected:,}" if self._expected is not None else ""
        text = f"{self._there + self._made:,}{of} sequences: {self._there:,} had labels, {self._made:,} got them"
        if self._began is None:
            return text
        rate = self._tokens / max(1e-9, time.monotonic() - self._began)
        return f"{text} ({self._tokens:,} tokens, {size_text(self._bytes)}, {rate:,.0f} tokens/s)"

    def phase(self, text: str) -> None:
        self._print(f"[{time.monotonic() - self._started:6.1f} s]  {text}")

    def note(self, text: str) -> None:
        self._print(text)

    def event(self, name: str, **fields: object) -> None:
        if name in SHOWN:
            self._print(SHOWN[name].format(**fields))
        elif name == "self_test":
            result = "passed" if fields["passed"] else "FAILED"
            self._print(f"self-test {fields['test']}: {result}, {fields['numbers']}")

    def span(self, lane: str, kind: str, start_s: float, stop_s: float, label: str = "") -> None: ...

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, evaluation: Evaluation, when: Moment) -> None: ...

    def generation(self, who: str, rows: tuple[Sequence, ...], texts: AbstractSequence[np.ndarray]) -> None: ...

    def __enter__(self) -> LabelProgress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
        self._print(self.summary)

    def _show(self) -> None:
        if self._status is not None:
            self._status.update(Text(self.summary))
        elif time.monotonic() - self._shown_at >= EVERY_S:
            self._shown_at = time.monotonic()
            self._print(self.summary)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed
            self._console.print(Text(text), soft_wrap=True, highlight=False)
