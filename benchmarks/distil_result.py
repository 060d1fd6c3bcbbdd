"""What `python -m benchmarks distil` found: medians, spreads and ratios of its segments, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.pipeline import PARTS, Segment


@dataclass(frozen=True, slots=True)
class DistilResult:
    segments: tuple[Segment, ...]
    plain_threads: Mapping[str, int]
    reasons: tuple[str, ...]  # why these dtypes

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(segment.side for segment in self.segments))

    def per_token_ms(self, side: str, part: str | None = None) -> list[float]:
        """CPU-milliseconds per token, by round; of one part, or of all."""
        return [1000 * _cpu_s(s, part) / s.tokens for s in self._of(side)]

    def per_loss_token_ms(self, side: str) -> list[float]:
        return [1000 * _cpu_s(s, None) / s.loss_tokens for s in self._of(side)]

    def ratios(self, side: str, to: str) -> list[float]:
        """Of the CPU time per token, within each round."""
        pairs = zip(self.per_token_ms(side), self.per_token_ms(to), strict=True)
        return [ours / theirs for ours, theirs in pairs]

    def system_share(self, side: str) -> float:
        """Of the CPU time, in the kernel."""
        times = [time for s in self._of(side) for time in s.cpu.values()]
        return sum(time.system_s for time in times) / max(sum(time.total_s for time in times), 1e-9)

    def _of(self, side: str) -> Iterator[Segment]:
        return (segment for segment in self.segments if segment.side == side)

    @property
    def _plain_sides(self) -> tuple[str, ...]:
        return tuple(self.plain_threads)

    def to_json(self) -> dict[str, Any]:
        summary = {}
        for side in self.sides:
            parts = [part for part in PARTS if side not in self._plain_sides]
            summary[side] = {
                "cpu_ms_per_token": _spread(self.per_token_ms(side)),
                "cpu_ms_per_loss_token": _spread(self.per_loss_token_ms(side)),
                "system_share": self.system_share(side),
                "parts_cpu_ms_per_token": {part: _spread(self.per_token_ms(side, part)) for part in parts},
                "ratio_to": {plain: _spread(self.ratios(side, plain)) for plain in self._plain_sides},
            }
        return {
            "summary": summary,
            "plain_threads": dict(self.plain_threads),
            "reasons": list(self.reasons),
            "segments": [asdict(segment) for segment in self.segments],
        }

    def table(self) -> Table:
        table = Table(title="CPU-milliseconds per token, all processes; median of the rounds (least-most)")
        table.add_column("side", no_wrap=True)
        columns = ["per token", "per loss token", *PARTS, *(f"/ {name}" for name in self._plain_sides), "kernel"]
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for side in self.sides:
            plain = side in self._plain_sides
            name = f"{side}, threads {self.plain_threads[side]}" if plain else side
            parts = ["" if plain else f"{median(self.per_token_ms(side, part)):.2f}" for part in PARTS]
            ratios = [_text(self.ratios(side, other)) for other in self._plain_sides]
            loss = f"{median(self.per_loss_token_ms(side)):.2f}"
            table.add_row(name, _text(self.per_token_ms(side)), loss, *parts, *ratios, f"{self.system_share(side):.0%}")
        return table


def _cpu_s(segment: Segment, part: str | None) -> float:
    return segment.cpu[part].total_s if part else sum(time.total_s for time in segment.cpu.values())


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def _text(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
