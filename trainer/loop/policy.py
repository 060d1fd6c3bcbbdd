"""Which weights of the student write the text of which step, and in which order that happens.

    train loop      train t-1 | sync t-1 | train t | sync t | train t+1            version t: weights after step t
    rollouts (d=1)             write t+1 -------|   write t+2 ---|                   with depth d, sync_every e

The text of step s is written with the weights of the last transfer at or before step s - 1 - d, by all of a version's
engines, before newer weights arrive, one step after the other. So the age of a text is at most d + e - 1 steps, and the
numbers of a run do not depend on timing. What was written for steps that are not trained yet is part of a checkpoint:
the weights that wrote it are gone by the time a run goes on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from contextlib import asynccontextmanager
from pathlib import Path

from trainer.loop.written import Written
from trainer.protocols import Generators
from trainer.types import Completion, GenerationRequest


class Policy:
    """Of one run, over all attempts at its steps."""

    def __init__(self, *, depth: int, sync_every: int) -> None:
        self._depth = depth
        self._sync_every = sync_every
        self._waiting: list[asyncio.Future[None]] = []
        self._version: int | None = None  # that the engines have; None: nobody knows
        self._done = 0  # the last step whose text is there, or will never be
        self._end = math.inf  # no step after it is to be written
        self.step = 0  # that is being written
        self.written = Written()

    @property
    def max_staleness(self) -> int:
        return self._depth + self._sync_every - 1

    def version_of(self, step: int) -> int:
        """By which a step is written, at least: a run that goes on from a checkpoint begins with that one's."""
        return max(0, (step - 1 - self._depth) // self._sync_every * self._sync_every)

    def begin(self, step: int, checkpoint: Path | None) -> None:
        """Training goes on after `step`, with what was written for later ones; before supply starts."""
        self._version, self._done, self._end = None, step, math.inf
        self.written = Written() if checkpoint is None else Written.load(checkpoint)

    def save(self, folder: Path, step: int) -> None:
        """What was written for steps after this one, into the folder of its checkpoint."""
        self.written.save(folder, after=step)

    @asynccontextmanager
    async def turn(self, step: int) -> AsyncIterator[None]:
        """Inside, a step is written, by the weights that are its own."""
        await self._until(lambda: self._done >= step - 1 and self._has_version_of(step))
        self.step = step
        try:
            yield
        finally:
            self._done = max(step, self._done)
            self._tell()

    def close(self, last: int) -> None:
        """No step after this one will be written."""
        self._end = last
        self._tell()

    async def drained(self, step: int) -> None:
        """After an optimizer step: until nothing is to be written any more by weights from before it."""
        await self._until(lambda: self._done >= min(step + self._depth, self._end))
        self.written.forget(step)

    def synced(self, version: int) -> None:
        """The engines have the weights after this step, and it is proven."""
        self._version = version
        self._tell()

    def _has_version_of(self, step: int) -> bool:
        return self._version is not None and self._version >= self.version_of(step)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            told = asyncio.get_running_loop().create_future()
            self._waiting.append(told)
            await told

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)


class PolicyWriter:
    """`OnPolicy` (trainer/protocols.py) for one task."""

    def __init__(self, task: str, policy: Policy, engines: Generators) -> None:
        self._task = task
        self._policy = policy
        self._engines = engines

    @property
    def max_staleness(self) -> int:
        return self._policy.max_staleness

    def staleness(self, completion: Completion) -> int:
        return self._policy.step - 1 - int(completion.versions[0][1])

    async def generate(self, requests: AbstractSequence[GenerationRequest]) -> list[Completion]:
        """What was written before the run was interrupted, and the rest by the engines."""
        step, written = self._policy.step, self._policy.written
        known: Mapping[str, Completion] = written.of(step, self._task)
        missing = [request for request in requests if request.id not in known]
        new = await self._engines.generate(missing) if missing else []
        made = {**known, **{request.id: one for request, one in zip(missing, new, strict=True)}}
        written.keep(step, self._task, {request.id: made[request.id] for request in requests})
        return [made[request.id] for request in requests]
