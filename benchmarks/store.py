"""`python -m benchmarks store`: what labels cost that are read from the label store, against the engine that made them.

One process with a vLLM scorer takes turns on every batch: the engine scores it; it scores it behind an empty store,
which keeps the labels; and a reader of that store gives the block without the engine. The store's files are in the page
cache, as those of the epoch before mostly are, so what is counted is work and not the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.scoring import Batch, engine_plan, token_stream
from benchmarks.store_worker import WAYS, Cost, Turn
from benchmarks.worker import Worker
from configs.labels import Hidden, Labels, TopK
from trainer.types import Sequence, Unit

SCORED, _, READ = WAYS
ENCODINGS: dict[str, Labels] = {"top-64": TopK(k=64), "hidden": Hidden()}


@dataclass(frozen=True, slots=True)
class StorePlan:
    teacher: Path
    batch: Batch
    rounds: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One batch, one way, once."""

    labels: str
    way: str
    tokens: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class StoreResult:
    measured: tuple[Measured, ...]

    def per_token_us(self, labels: str, way: str) -> list[float]:
        """CPU-microseconds, by round."""
        return [1e6 * m.cost.cpu.total_s / m.tokens for m in self._of(labels, way)]

    def shares(self, labels: str, way: str) -> list[float]:
        """Of what the engine took for the same batch."""
        pairs = zip(self.per_token_us(labels, way), self.per_token_us(labels, SCORED), strict=True)
        return [mine / scored for mine, scored in pairs]

    def _of(self, labels: str, way: str) -> list[Measured]:
        return [m for m in self.measured if (m.labels, m.way) == (labels, way)]

    def to_json(self) -> dict[str, Any]:
        summary = [
            {"labels": labels, "way": way, "share": median(self.shares(labels, way)), **self._sizes(labels, way)}
            for labels in ENCODINGS
            for way in WAYS
        ]
        return {"summary": summary, "measured": [asdict(m) for m in self.measured]}

    def _sizes(self, labels: str, way: str) -> dict[str, float]:
        one = self._of(labels, way)[-1]
        return {
            "cpu_us_per_token": median(self.per_token_us(labels, way)),
            "label_bytes_per_token": one.cost.num_bytes / one.tokens,
            "disk_bytes_per_token": one.cost.disk_bytes / one.tokens,
        }

    def table(self) -> Table:
        table = Table(title="CPU time of a labelled batch; median of the rounds (least-most)")
        table.add_column("labels")
        table.add_column("way")
        for column in ("share of scoring", "CPU-us per token", "label bytes per token", "on disk"):
            table.add_column(column, justify="right")
        for labels in ENCODINGS:
            for way in WAYS:
                shares, sizes = self.shares(labels, way), self._sizes(labels, way)
                table.add_row(
                    labels,
                    way,
                    f"{100 * median(shares):.2f} % ({100 * min(shares):.2f}-{100 * max(shares):.2f})",
                    f"{sizes['cpu_us_per_token']:.1f}",
                    f"{sizes['label_bytes_per_token']:.0f}",
                    f"{sizes['disk_bytes_per_token']:.0f}" if sizes["disk_bytes_per_token"] else "",
                )
        return table


def measure(plan: StorePlan, work: Path, *, note: Callable[[str], None]) -> StoreResult:
    """`work` is an empty folder, and `note` is told what goes on."""
    return asyncio.run(_measure(plan, work, note))


async def _measure(plan: StorePlan, work: Path, note: Callable[[str], None]) -> StoreResult:
    engine, _ = engine_plan(plan.teacher, work, plan.batch.tokens)
    note("starting the scorer")
    log = work / "scorer.log"
    worker = await Worker.start("benchmarks.store_worker", engine, environment=engine.environment, log=log)
    ids, measured = token_stream(plan.teacher), []
    try:
        for number in range(plan.rounds + 1):
            unit = _unit(plan.batch, ids, seed=number)
            for name, labels in ENCODINGS.items():
                folder = work / f"{number}-{name}"
                for way in WAYS:
                    cost = await worker.ask(Turn(way, unit, labels, str(folder)))
                    if number:  # the first round warms up
                        measured.append(Measured(name, way, unit.num_tokens, cost))
                        note(f"round {number}: {name} {way}: {1e6 * cost.cpu.total_s / unit.num_tokens:.1f} us a token")
    finally:
        await worker.close()
    return StoreResult(tuple(measured))


def _unit(batch: Batch, ids: np.ndarray, *, seed: int) -> Unit:
    """Every row but the last of each text has a label."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - batch.tokens, size=batch.sequences)
    rows = np.ones(batch.tokens, dtype=bool)
    rows[-1] = False
    texts = (ids[start : start + batch.tokens] for start in starts)
    return Unit(f"{seed}", tuple(Sequence(f"{i}", text, rows, "dataset") for i, text in enumerate(texts)))
