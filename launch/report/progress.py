"""What a person sees while a run works: one live block on a terminal, sparse plain lines everywhere else.

Plain lines (CI, Slurm, a pipe): every phase and evaluation, the first steps, then at most one step per ten seconds, and
the last step. Nothing here decides anything: a run without it is the same run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from launch.log_level import LogLevel
from launch.report.hours import hours_text, left_text
from launch.report.metrics import LOSS, NOTICEABLE_PADDING, STUDENT_WAIT, TEACHER_WAIT, TOKENS_PER_S
from launch.report.numbers import duration, fixed, share
from trainer.types import Evaluation, StepMetrics

_FIRST_STEPS = 3
_PLAIN_EVERY_S = 10.0


class Progress:
    """Shows phases, steps and evaluations. `plain=None` decides by whether the console is a terminal.

    `level`: of the least that is shown. Phases and steps are info, notes and evaluations are warning: what a person may
    have to know. `clock` is monotonic seconds. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        console: Console | None = None,
        plain: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        level: LogLevel = LogLevel.info,
        device: str = "device",
    ) -> None:
        self._device = device
        self._total = total_steps
        self._console = console or Console()
        self._clock = clock
        self._level = level
        self._started = clock()
        self._phase: str | None = None
        self._phase_started = self._started
        self._step: StepMetrics | None = None
        self._shown = 0
        self._shown_at = -math.inf
        self._last: Evaluation | None = None
        self._live: Live | None = None
        if level.shows(LogLevel.info) and not (plain if plain is not None else not self._console.is_terminal):
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()

    def phase(self, text: str) -> None:
        """A part of the run that is no step has begun ("teachers: loading"); the one before it is over."""
        self._end_phase()
        self._phase, self._phase_started = text, self._clock()
        if self._live is None and self._level.shows(LogLevel.info):
            self._print(f"{_clock_text(self._phase_started - self._started)}  {text}")

    def step(self, metrics: StepMetrics) -> None:
        self._end_phase()
        now = self._clock()
        self._step = metrics
        self._shown += 1
        due = self._shown <= _FIRST_STEPS or now - self._shown_at >= _PLAIN_EVERY_S or metrics.step == self._total
        due = due or self._level is LogLevel.debug
        if self._live is None and self._level.shows(LogLevel.info) and due:
            self._shown_at = now
            self._print(f"step {metrics.step}/{self._total}  {self._numbers()}  {self._eta()}")

    def evaluation(self, evaluation: Evaluation, before: Evaluation | None) -> None:
        """`before`: of the student before it learned anything, what this one is compared with."""
        self._end_phase()
        self._last = evaluation
        self.note(f"evaluation at step {evaluation.step}: {_quality(before, evaluation)}")
        for name, one in evaluation.tasks.items():
            self.note(f"  {name}: {_quality(before and before.tasks.get(name), one)}")

    def note(self, text: str) -> None:
        """One line that stays."""
        if self._level.shows(LogLevel.warning):
            self._print(text)

    def detail(self, text: str) -> None:
        """A line for whoever searches for an error: with level debug alone."""
        if self._level is LogLevel.debug:
            self._print(f"{_clock_text(self._clock() - self._started)}  {text}")

    def close(self) -> None:
        """Leave the terminal as it was found; the last state stays on it. May be called twice."""
        self._end_phase()
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_phase(self) -> None:
        if self._phase is not None and self._live is not None:
            self._print(f"{self._phase}  {self._clock() - self._phase_started:.1f} s")
        self._phase = None

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed, or a reader that is gone
            self._console.print(Text(text), soft_wrap=True, highlight=False)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._step is not None:
            bar = Table.grid(padding=(0, 2))
            bar.add_row(
                Text(f"step {self._step.step}/{self._total}", style="bold"),
                ProgressBar(total=self._total, completed=self._step.step, width=32),
                Text(self._eta()),
            )
            parts += [bar, Text(self._numbers())]
        if self._phase is not None:
            elapsed = self._clock() - self._phase_started
            parts.append(Spinner("dots", Text(f"{self._phase}  {elapsed:.0f} s")))
        return Group(*parts)

    def _numbers(self) -> str:
        """The step's numbers that are known, in a fixed order."""
        values: Mapping[str, float] = self._step.values if self._step else {}
        parts = []
        if TOKENS_PER_S in values:
            parts.append(f"{fixed(values[TOKENS_PER_S], 0)} tokens/s")
        if LOSS in values:
            parts.append(f"loss {_three(values[LOSS])}")
        if self._last is not None:
            name, value = self._last.headline
            parts.append(f"{name} {_three(value)} at step {self._last.step}")
        waits = [
            f"{who} {values[name]:.0%}"
            for who, name in (("student", STUDENT_WAIT), ("teacher", TEACHER_WAIT))
            if name in values and math.isfinite(values[name])
        ]
        if waits:
            parts.append("waiting: " + ", ".join(waits))
        return "  ".join(parts)

    def _eta(self) -> str:
        if self._step is None or self._step.step >= self._total:
            return f"{duration(self._clock() - self._started)} since the start"
        values = self._step.values
        return "  ".join(filter(None, (left_text(values), hours_text(values, self._device))))


def _quality(before: Evaluation | None, now: Evaluation) -> str:
    """What was measured, before and now."""
    perplexity = f"perplexity {_change(before and before.perplexity, now.perplexity, _two)}"
    if now.forward_kl is None or now.agreement is None:
        return perplexity + _padding(before, now)
    teacher = "" if now.teacher_perplexity is None else f" (teacher {_two(now.teacher_perplexity)})"
    return (
        f"KL {_change(before and before.forward_kl, now.forward_kl, _three)} nats/{now.kl_unit}, "
        f"agreement {_change(before and before.agreement, now.agreement, share)}, "
        f"{perplexity}{teacher}" + _padding(before, now)
    )


def _change(before: float | None, now: float, form: Callable[[float], str]) -> str:
    return form(now) if before is None else f"{form(before)} -> {form(now)}"


def _two(value: float) -> str:
    return fixed(value, 2)


def _three(value: float) -> str:
    return fixed(value, 3)


def _padding(before: Evaluation | None, now: Evaluation) -> str:
    if max(now.padding_mass, before.padding_mass if before else 0.0) < NOTICEABLE_PADDING:
        return ""
    return f", on ids that do not exist {_change(before and before.padding_mass, now.padding_mass, share)}"


def _clock_text(seconds: float) -> str:
    return f"[{seconds:6.1f} s]"
