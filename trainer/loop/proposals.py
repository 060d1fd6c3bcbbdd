"""Ids that the students choose for the units of a step, between two steps: where supply and train loop meet for it.

    supply                                      train loop
    ------                                      ----------
    plan the units of step s
    of(batches): wait for their ids             planned(s), then choose(s): all ranks run the student forward
    score the units with them                   train the steps before s, then step s

Choosing is collective, so it is a call of the train loop, never beside a step. Which weights choose is fixed: those
after step s - 1 - `lag` (`LoopSettings.ids_lag`), or the first ones. So the numbers of a run do not depend on timing;
what was chosen for steps that are not trained yet is part of a checkpoint, since those weights are gone.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping

from trainer.protocols import Observer, Students
from trainer.types import RankBatch, RowIdsRef, Unit

Batches = tuple[RankBatch, ...]


class Proposals:
    """Of one attempt at the steps of a run."""

    def __init__(self, students: Students, takes_ids: Callable[[Unit], bool] | None, observer: Observer) -> None:
        """`takes_ids`: whether ids are chosen for a unit; None: for none of the run."""
        self._students = students
        self._takes_ids = takes_ids
        self._observer = observer
        self._planned: dict[int, asyncio.Future[Batches | None]] = {}
        self._chosen: dict[int, asyncio.Future[Mapping[str, RowIdsRef]]] = {}
        self._last = 0  # step that was chosen for, or had nothing to choose
        self._end = math.inf  # no step after it will be planned

    async def of(self, batches: Batches) -> Mapping[str, RowIdsRef]:
        """For supply: where the ids of each unit of a step lie, by unit; of units whose labels take any."""
        step, asked = batches[0].step, self._takes_ids
        if asked is None or not any(asked(unit) for batch in batches for unit in batch.units):
            self.nothing(step)
            return {}
        chosen = self._chosen[step] = asyncio.get_running_loop().create_future()
        self._resolve(step, batches)
        return await chosen

    def nothing(self, step: int) -> None:
        """For supply: nothing is to be chosen for a step, or it will never be planned."""
        if self._takes_ids is not None and step > self._last:
            self._resolve(step, None)

    def close(self, last: int) -> None:
        """For supply: no step after this one will be planned."""
        self._end = last
        for step, planned in self._planned.items():
            if step > last and not planned.done():
                planned.set_result(None)

    async def planned(self, step: int) -> None:
        """Until `choose` need not wait."""
        if self._takes_ids is not None:
            await asyncio.shield(self._future(step))

    async def choose(self, step: int) -> float:
        """For the train loop, between two steps: let the students choose for a step that is planned. Returns seconds;
        0 where there was nothing to choose."""
        batches = None if self._takes_ids is None else await self._planned.pop(step)
        self._last = step
        if batches is None:
            return 0.0
        started = time.time()
        ids = await self._students.propose(batches)
        stopped = time.time()
        self._observer.span("student", "ids", started, stopped, f"step {step}")
        chosen = self._chosen.pop(step)
        if not chosen.done():  # supply may have been cancelled
            chosen.set_result(ids)
        return stopped - started

    def _resolve(self, step: int, batches: Batches | None) -> None:
        planned = self._future(step)
        if not planned.done():
            planned.set_result(batches)

    def _future(self, step: int) -> asyncio.Future[Batches | None]:
        if step not in self._planned:
            self._planned[step] = asyncio.get_running_loop().create_future()
            if step > self._end:
                self._planned[step].set_result(None)
        return self._planned[step]
