"""Where a step draws its prompts, and how they become sequences: from one task, or from several by their shares."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from trainer.data.prompts import PromptStream
from trainer.errors import ConfigError
from trainer.loop.shares import counts_of_step
from trainer.protocols import AnswerCollector
from trainer.types import AnswerCounters, Collected, Cursor, Prompt, StreamCounters


@dataclass(frozen=True, slots=True)
class Drawn:
    """The prompts of one step, and the cursor after them."""

    step: int
    prompts: tuple[Prompt, ...]  # those of one task beside each other
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


class SharedSource:
    """Several tasks, each with a stream, a way to answer and a share of the sequences.

    Positions are drawn, so that what a step holds depends on no row: one that is left out is not refilled.
    """

    def __init__(
        self,
        streams: Mapping[str, PromptStream],
        answers: Mapping[str, AnswerCollector],
        shares: Mapping[str, float],
        *,
        sequences_per_step: int,
    ) -> None:
        """All mappings by the same names of tasks."""
        self._streams = streams
        self._answers = answers
        self._shares = shares
        self._sequences_per_step = sequences_per_step
        self._written = AnswerCounters()  # before the first step that is drawn here

    @property
    def cursor(self) -> Cursor:
        return summed({name: stream.cursor for name, stream in self._streams.items()}, self._written)

    def seek(self, cursor: Cursor) -> None:
        """Raises `ConfigError` for a cursor of other tasks."""
        tasks = cursor.tasks
        if tasks.keys() != self._streams.keys():
            was, now = ", ".join(tasks) or "one task", ", ".join(self._streams)
            raise ConfigError(
                f"the checkpoint was trained on the tasks {was}, and the run has {now}: a run goes on with its own "
                "tasks only; put them back, or give this one another name or folder"
            )
        for name, stream in self._streams.items():
            stream.seek(tasks[name])
        self._written = cursor.answers

    def take(self, step: int) -> Drawn:
        drawn = {name: stream.cursor.counters.read for name, stream in self._streams.items()}
        counts = counts_of_step(self._shares, drawn, self._sequences_per_step)
        prompts = [prompt for name, count in counts.items() for prompt in self._streams[name].take(count)]
        return Drawn(step, tuple(prompts), self.cursor)

    async def collect(self, drawn: Drawn) -> Collected:
        """In the order of the tasks."""
        of_tasks = [[prompt for prompt in drawn.prompts if prompt.task == name] for name in self._answers]
        collected = await asyncio.gather(
            *(answers.collect(prompts) for answers, prompts in zip(self._answers.values(), of_tasks, strict=True))
        )
        counters = AnswerCounters()
        for one in collected:
            counters = counters.plus(one.answers)
        return Collected(tuple(sequence for one in collected for sequence in one.sequences), counters)

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        """All answers together are judged by the rule of each task."""
        for collector in self._answers.values():
            collector.judge(answers, last=last)


def summed(tasks: Mapping[str, Cursor], answers: AnswerCounters) -> Cursor:
    """One cursor that holds those of all tasks; its own position is the number of all positions drawn."""
    counters = StreamCounters()
    for cursor in tasks.values():
        counters = counters.plus(cursor.counters)
    seed = next(iter(tasks.values())).seed
    return Cursor(0, counters.read, seed, counters=counters, answers=answers, tasks=dict(tasks))
