"""Where a step draws its prompts, and how they become sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from trainer.data.prompts import PromptStream
from trainer.protocols import AnswerCollector
from trainer.types import AnswerCounters, Collected, Cursor, Prompt


@dataclass(frozen=True, slots=True)
class Drawn:
    """The prompts of one step, and the cursor after them."""

    step: int
    prompts: tuple[Prompt, ...]
    cursor: Cursor


class Source(Protocol):
    """What the supply asks for the sequences of a step."""

    @property
    def cursor(self) -> Cursor:
        """After what was drawn so far."""
        ...

    def seek(self, cursor: Cursor) -> None:
        """The next step is drawn from there. Not while `take` runs."""
        ...

    def take(self, step: int) -> Drawn:
        """Called in the order of the steps, in a thread, never twice at once. Raises `DataError` for a bad row."""
        ...

    async def collect(self, drawn: Drawn) -> Collected:
        """The sequences of the step; several steps may be collected at once."""
        ...

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        """Raises `DataError` where too many answers of the run so far could not be trained on. `last`: none follow."""
        ...


class SingleSource:
    """One stream of prompts and one way to answer them."""

    def __init__(self, stream: PromptStream, answers: AnswerCollector, *, sequences_per_step: int) -> None:
        self._stream = stream
        self._answers = answers
        self._sequences_per_step = sequences_per_step

    @property
    def cursor(self) -> Cursor:
        return self._stream.cursor

    def seek(self, cursor: Cursor) -> None:
        self._stream.seek(cursor)

    def take(self, step: int) -> Drawn:
        prompts = self._stream.take(self._sequences_per_step)
        return Drawn(step, tuple(prompts), self._stream.cursor)

    async def collect(self, drawn: Drawn) -> Collected:
        return await self._answers.collect(drawn.prompts)

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        self._answers.judge(answers, last=last)
