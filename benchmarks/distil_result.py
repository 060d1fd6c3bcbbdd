"""What `python -m benchmarks distil` found: medians, spreads and ratios of its segments, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.floor import Floor
from benchmarks.pipeline import PARTS, STUDENT, TEACHER, Segment


@dataclass(frozen=True, slots=True)
class DistilResult:
    segments: tuple[Segment, ...]
    floors: tuple[Floor, ...]  # by round
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

    def floors_ms(self, side: str, role: str | None = None) -> list[float]:
        """CPU-milliseconds per token, by round, that the arithmetic of a role alone takes, or of both together. What
        the plain recipe computes is what `hidden` labels do, in one process."""
        labels = "hidden" if side in self._plain_sides else side
        found = []
        for s in self._of(side):
            floor = self.floors[s.round]
            roles = {
                TEACHER: floor.teacher_s(labels, tokens=s.tokens, rows=s.loss_tokens),
                STUDENT: floor.student_s(labels, tokens=s.tokens, rows=s.loss_tokens, steps=s.steps),
            }
            found.append(1000 * (roles[role] if role else sum(roles.values())) / s.tokens)
        return found

    def multiples(self, side: str, role: str | None = None) -> list[float]:
        """Of the floor, by round; of a role, or of all."""
        pairs = zip(self.per_token_ms(side, role), self.floors_ms(side, role), strict=True)
        return [spent / floor for spent, floor in pairs]

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
                "floor_cpu_ms_per_token": {
                    "sum": _spread(self.floors_ms(side)),
                    **{role: _spread(self.floors_ms(side, role)) for role in (TEACHER, STUDENT)},
                },
                "multiple_of_floor": {
                    "sum": _spread(self.multiples(side)),
                    **{role: _spread(self.multiples(side, role)) for role in (TEACHER, STUDENT) if role in parts},
                },
            }
        return {
            "summary": summary,
            "plain_threads": dict(self.plain_threads),
            "reasons": list(self.reasons),
            "segments": [asdict(segment) for segment in self.segments],
            "floors": [asdict(floor) for floor in self.floors],
        }

    def table(self) -> Table:
        table = Table(
            title="CPU-milliseconds per token, all processes; median of the rounds (least-most)",
            caption="floor: the products, one pass over the logits and the optimizer's bytes alone; x: multiple of it",
        )
        table.add_column("side", no_wrap=True)
        columns = [
            "per token",
            "floor",
            "x",
            "per loss token",
            *PARTS,
            *(f"/ {name}" for name in self._plain_sides),
            "kernel",
        ]
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for side in self.sides:
            plain = side in self._plain_sides
            name = f"{side}, threads {self.plain_threads[side]}" if plain else side
            parts = ["" if plain else self._part(side, part) for part in PARTS]
            floor = [f"{median(self.floors_ms(side)):.2f}", _text(self.multiples(side))]
            ratios = [_text(self.ratios(side, other)) for other in self._plain_sides]
            loss = f"{median(self.per_loss_token_ms(side)):.2f}"
            own = _text(self.per_token_ms(side))
            table.add_row(name, own, *floor, loss, *parts, *ratios, f"{self.system_share(side):.0%}")
        return table

    def _part(self, side: str, part: str) -> str:
        """Its CPU time, and of a role its multiple of the floor."""
        text = f"{median(self.per_token_ms(side, part)):.2f}"
        return f"{text} ({median(self.multiples(side, part)):.2f} x)" if part in (TEACHER, STUDENT) else text


def _cpu_s(segment: Segment, part: str | None) -> float:
    return segment.cpu[part].total_s if part else sum(time.total_s for time in segment.cpu.values())


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def _text(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
