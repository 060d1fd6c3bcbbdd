"""The thread in which the transformers engine works, and its counts; scorer and generator share it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.engines.units import EngineStatistics
from trainer.errors import DeadlineExceeded

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class SequenceLoop:
    """Runs work for asyncio in one thread, sequence by sequence, so that the event loop stays free; and counts it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{name}")
        self._cpu_at_start = time.process_time()
        self._inside = self._peak = 0
        self._units = self._tokens = self._rows = self._steps = 0
        self._busy_s = 0.0

    async def run(
        self, items: AbstractSequence[_Item], work: Callable[[_Item], _Result], *, name: str, deadline_s: float
    ) -> list[_Result]:
        """The result of `work` for each item. Raises `DeadlineExceeded`; the items not begun by then never run."""
        loop = asyncio.get_running_loop()
        results: list[_Result] = []
        self._inside += 1
        self._peak = max(self._peak, self._inside)
        try:
            async with asyncio.timeout(deadline_s):
                for item in items:
                    results.append(await loop.run_in_executor(self._executor, self._timed, work, item))
        except TimeoutError:
            raise DeadlineExceeded(
                f"{name}: {len(results)} of {len(items)} sequences left {self.name} within {deadline_s:.1f} s"
            ) from None
        finally:
            self._inside -= 1
        return results

    def _timed(self, work: Callable[[_Item], _Result], item: _Item) -> _Result:
        started = time.monotonic()
        result = work(item)
        self._steps += 1
        self._busy_s += time.monotonic() - started
        return result

    def count(self, *, num_tokens: int, num_rows: int) -> None:
        """A unit is done."""
        self._units += 1
        self._tokens += num_tokens
        self._rows += num_rows

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            num_units=self._units,
            num_tokens=self._tokens,
            num_rows=self._rows,
            num_steps=self._steps,
            busy_s=self._busy_s,
            cpu_s=time.process_time() - self._cpu_at_start,
            max_concurrent_units=self._peak,
        )

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)
