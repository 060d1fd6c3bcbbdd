"""Where a step draws its prompts, from each task by its share, and how they become sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from configs.section import MAIN
from trainer.data.prompts import PromptStream
from trainer.errors import ConfigError, DataError
from trainer.loop.shares import counts_of_step
from trainer.protocols import AnswerCollector
from trainer.types import AnswerCounters, Collected, Cursor, Prompt, StreamCounters


@dataclass(frozen=True, slots=True)
class Drawn:
    """The prompts of one step, and the cursor after them."""

    step: int
    prompts: tuple[Prompt, ...]  # those of one task beside each other
    cursor: Cursor


class Source:
    """Tasks, each with a stream, a way to answer and a share of the sequences; a run with one task is the case of one.

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

    @property
    def cursor(self) -> Cursor:
        """After what was drawn so far: of the only stream where the run names no tasks, else the sum of all."""
        cursors = {name: stream.cursor for name, stream in self._streams.items()}
        return cursors[MAIN] if cursors.keys() == {MAIN} else summed(cursors)

    def seek(self, cursor: Cursor) -> None:
        """The next step is drawn from there. Not while `take` runs. Raises `ConfigError` for a cursor of other
        tasks."""
        tasks = cursor.tasks or {MAIN: cursor}
        if tasks.keys() != self._streams.keys():
            was, now = ", ".join(tasks), ", ".join(self._streams)
            raise ConfigError(
                f"the checkpoint was trained on the tasks {was}, and the run has {now}: a run goes on with its own "
                "tasks only; put them back, or give this one another name or folder"
            )
        for name, stream in self._streams.items():
            stream.seek(tasks[name])

    def take(self, step: int) -> Drawn:
        """Called in the order of the steps, in a thread, never twice at once. Raises `DataError` for a bad row."""
        drawn = {name: stream.cursor.counters.read for name, stream in self._streams.items()}
        counts = counts_of_step(self._shares, drawn, self._sequences_per_step)
        prompts = [prompt for name, count in counts.items() for prompt in self._streams[name].take(count)]
        return Drawn(step, tuple(prompts), self.cursor)

    async def collect(self, drawn: Drawn) -> Collected:
        """The sequences of the step, in the order of the tasks; several steps may be collected at once."""
        of_tasks = [[prompt for prompt in drawn.prompts if prompt.task == name] for name in self._answers]
        collected = await asyncio.gather(
            *(answers.collect(prompts) for answers, prompts in zip(self._answers.values(), of_tasks, strict=True))
        )
        return Collected(
            tuple(sequence for one in collected for sequence in one.sequences),
            AnswerCounters.sum(one.answers for one in collected),
            {name: one.answers for name, one in zip(self._answers, collected, strict=True)},
        )

    def judge(self, cursor: Cursor, *, last: bool) -> None:
        """The answers of each task up to a cursor are judged by its own rule: raises `DataError` where too many could
        not be trained on. `last`: none follow."""
        for name, collector in self._answers.items():
            of_task = cursor.tasks.get(name, cursor)
            try:
                collector.judge(of_task.answers, last=last)
            except DataError as error:
                raise DataError(f"task {name}: {error}" if cursor.tasks else str(error)) from None


def summed(tasks: Mapping[str, Cursor]) -> Cursor:
    """One cursor that holds those of all tasks; its own position is the number of all positions drawn."""
    counters = StreamCounters()
    for cursor in tasks.values():
        counters = counters.plus(cursor.counters)
    answers = AnswerCounters.sum(cursor.answers for cursor in tasks.values())
    seed = next(iter(tasks.values())).seed
    return Cursor(0, counters.read, seed, counters=counters, answers=answers, tasks=dict(tasks))
