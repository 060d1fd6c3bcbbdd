"""Where a step draws its prompts, from each task by its share, and how they become sequences."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from configs.section import MAIN
from trainer.data.prompts import PromptStream
from trainer.errors import ConfigError, DataError
from trainer.loop.policy import Policy
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
        policy: Policy | None = None,
        on_policy: Container[str] = (),
    ) -> None:
        """All mappings by the same names of tasks. `on_policy`: those whose text the student writes, by `policy`."""
        self._streams = streams
        self._answers = answers
        self._shares = shares
        self._sequences_per_step = sequences_per_step
        self._policy = policy
        self._on_policy = [name for name in answers if name in on_policy]

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
        of_tasks = {name: [prompt for prompt in drawn.prompts if prompt.task == name] for name in self._answers}
        others = [name for name in self._answers if name not in self._on_policy]
        *found, own = await asyncio.gather(
            *(self._answers[name].collect(of_tasks[name]) for name in others), self._collect_own(drawn.step, of_tasks)
        )
        by_task = dict(zip(others, found, strict=True)) | own
        collected = [by_task[name] for name in self._answers]
        return Collected(
            tuple(sequence for one in collected for sequence in one.sequences),
            AnswerCounters.sum(one.answers for one in collected),
            {name: one.answers for name, one in zip(self._answers, collected, strict=True)},
            numbers={name: number for one in collected for name, number in one.numbers.items()},
        )

    async def _collect_own(self, step: int, of_tasks: Mapping[str, list[Prompt]]) -> dict[str, Collected]:
        """Of the tasks whose text the student writes, in the step's turn and one after the other."""
        if self._policy is None or not self._on_policy:
            return {}
        async with self._policy.turn(step):
            started = time.monotonic()
            found = {name: await self._answers[name].collect(of_tasks[name]) for name in self._on_policy}
            took_s = time.monotonic() - started
        name, one = next(iter(found.items()))
        return found | {name: replace(one, numbers={**one.numbers, "rollout/write_s": took_s})}

    def close(self, last: int) -> None:
        """No step after this one will be collected."""
        if self._policy is not None:
            self._policy.close(last)

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
