"""The process of `benchmarks store`: one vLLM scorer, with a label store before it or without."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cpu_time import CpuTime, of_this_process
from cluster.engines.plan import EnginePlan, StorePlan
from cluster.engines.store import StoredScorer
from cluster.engines.vllm import Engine
from configs.labels import Labels
from trainer.types import Unit

WAYS = ("scored", "scored and kept", "read from the store")
DEADLINE_S = 1800.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One batch, one way; `folder` holds the store, which the second way fills and the third reads."""

    way: str
    unit: Unit
    labels: Labels
    folder: str


@dataclass(frozen=True, slots=True)
class Cost:
    cpu: CpuTime
    wall_s: float
    num_bytes: int  # of the labels
    disk_bytes: int  # of the store


def prepare(plan: EnginePlan) -> Callable[[Turn], Cost]:
    """Load the engine; a turn is what a scorer of a run does with a unit, writing what it keeps included."""
    engine = Engine().start_scorer(plan, "bench-scorer")

    def take(turn: Turn) -> Cost:
        kept = replace(plan, store=StorePlan(turn.folder, 2**40, writes=turn.way == WAYS[1], teacher={}))
        asked = engine if turn.way == WAYS[0] else StoredScorer(kept, "stored", engine=None)
        if turn.way == WAYS[1]:
            asked = StoredScorer(kept, "stored", engine=engine)
        before, started = of_this_process(), time.monotonic()
        _, block = asyncio.run(asked.score(turn.unit, turn.labels, deadline_s=DEADLINE_S))
        if isinstance(asked, StoredScorer):
            asked.close_store()
        cpu, wall_s = of_this_process() - before, time.monotonic() - started
        files = [file.stat().st_size for file in Path(turn.folder).rglob("*") if file.is_file()]
        return Cost(cpu, wall_s, block.num_bytes, sum(files))

    return take
