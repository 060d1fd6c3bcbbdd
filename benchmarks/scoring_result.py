"""What `python -m benchmarks scoring` measured, as numbers and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.floor import Floor
from benchmarks.scoring_worker import Cost

PREFILL = "bare prefill"


@dataclass(frozen=True, slots=True)
class Measured:
    """One way of reading one batch, once."""

    way: str
    batch: str
    round: int
    tokens: int
    rows: int  # that are multiplied by the head
    cost: Cost


@dataclass(frozen=True, slots=True)
class ScoringResult:
    measured: tuple[Measured, ...]
    floors: tuple[Floor, ...]  # by round
    reasons: tuple[str, ...]

    def per_token_ms(self, way: str, batch: str) -> list[float]:
        """CPU-milliseconds, by round."""
        return [1000 * m.cost.cpu.total_s / m.tokens for m in self._of(way, batch)]

    def ratios(self, way: str, batch: str) -> list[float]:
        """To the bare prefill of the same batch in the same round."""
        pairs = zip(self.per_token_ms(way, batch), self.per_token_ms(PREFILL, batch), strict=True)
        return [mine / bare for mine, bare in pairs]

    def least_ratios(self, way: str, batch: str) -> list[float]:
        """What the ratios would be if a way cost no more than the bare prefill as it was measured, the head's product
        with its rows at the rate of this processor, and one pass over the logits."""
        bare = self.per_token_ms(PREFILL, batch)
        heads = [1000 * self.floors[m.round].teacher_head * m.rows / m.tokens for m in self._of(way, batch)]
        return [1 + head / cost for head, cost in zip(heads, bare, strict=True)]

    def multiples(self, way: str, batch: str) -> list[float]:
        """Of the arithmetic floor of all of it: the products of the body too."""
        return [
            m.cost.cpu.total_s / (m.tokens * floor.teacher_body + m.rows * floor.teacher_head)
            for m in self._of(way, batch)
            for floor in [self.floors[m.round]]
        ]

    def bytes_per_token(self, way: str, batch: str) -> float:
        found = self._of(way, batch)
        return sum(m.cost.num_bytes for m in found) / sum(m.tokens for m in found)

    def _of(self, way: str, batch: str) -> list[Measured]:
        return [m for m in self.measured if (m.way, m.batch) == (way, batch)]

    @property
    def _rows(self) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys((m.batch, m.way) for m in self.measured))

    def to_json(self) -> dict[str, Any]:
        summary = [
            {
                "batch": batch,
                "way": way,
                "ratio": median(self.ratios(way, batch)),
                "ratios": self.ratios(way, batch),
                "least_ratio": median(self.least_ratios(way, batch)),
                "multiple_of_floor": median(self.multiples(way, batch)),
                "cpu_ms_per_token": median(self.per_token_ms(way, batch)),
                "label_bytes_per_token": self.bytes_per_token(way, batch),
            }
            for batch, way in self._rows
        ]
        measured, floors = [asdict(m) for m in self.measured], [asdict(floor) for floor in self.floors]
        return {"summary": summary, "reasons": list(self.reasons), "floors": floors, "measured": measured}

    def table(self) -> Table:
        table = Table(title="CPU time of a batch over that of its bare prefill; medians of the rounds (least-most)")
        table.add_column("batch")
        table.add_column("way")
        for column in ("ratio", "least possible", "CPU-ms per token", "multiple of floor", "label bytes per token"):
            table.add_column(column, justify="right")
        for batch, way in self._rows:
            ratios, label_bytes = self.ratios(way, batch), self.bytes_per_token(way, batch)
            table.add_row(
                batch,
                way,
                f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                f"{median(self.least_ratios(way, batch)):.2f}",
                f"{median(self.per_token_ms(way, batch)):.3f}",
                f"{median(self.multiples(way, batch)):.2f}",
                f"{label_bytes:.0f}" if label_bytes else "",
            )
        return table
