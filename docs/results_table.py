"""docs/results.md and its picture, made from docs/results.json: `python -m docs.results_table` writes both."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.learning import DIVERGENCES, ENCODINGS, Cell, cells, interval

DATA = Path(__file__).with_name("results.json")
PAGE, PICTURE = DATA.with_suffix(".md"), DATA.with_suffix(".svg")
REFERENCE = Cell(ENCODINGS[-1], DIVERGENCES[0])
HEAD = """# What labels and losses teach

The same student, the same texts in the same order, the same number of steps: only what it learns from differs. Made by
`python -m docs.results_table` from `docs/results.json`, which `python -m benchmarks learning --out docs/results.json`
wrote.

![Held-out KL under each encoding and each divergence, with 95 % intervals](results.svg)

"""
EXPLAINED = """
A number is KL(teacher, student) in nats per token over the whole vocabulary, on held-out answers: less is better, and
it is what `forward_kl` minimises, so that other divergences are measured by another's yardstick here. Intervals are
95 % by Student's t over the seeds. A seed decides the order of the texts and what is drawn, and is the same for all
cells: so the last column compares seed by seed, and an interval of it that does not reach 0 is a difference.
"""
CAPTION = "held-out KL(teacher, student), nats per token; bars: 95 % intervals"
WIDTH, LEFT, RIGHT, TOP, ROW = 760, 210, 30, 52, 26


@dataclass(frozen=True, slots=True)
class Result:
    """One cell: over its seeds, and over the differences to the reference of the same seeds."""

    cell: Cell
    mean: float
    half: float
    difference: float
    difference_half: float

    @classmethod
    def of(cls, cell: Cell, found: dict[str, dict[str, float]]) -> Result:
        own, reference = found[cell.name], found[REFERENCE.name]
        differences = [value - reference[seed] for seed, value in own.items()]
        return cls(cell, *interval(list(own.values())), *interval(differences))


def results_table() -> str:
    """The page."""
    found = json.loads(DATA.read_text())
    results = [Result.of(cell, found["cells"]) for cell in cells()]
    lines = [HEAD + "| labels | objective | held-out KL | beside exact labels and `forward_kl` |", "|---|---|---|---|"]
    lines += [_row(one) for one in results]
    return "\n".join([*lines, EXPLAINED, _how(found)]) + "\n"


def picture() -> str:
    """An SVG in light or dark colours, as whoever looks at it has them."""
    found = json.loads(DATA.read_text())
    results = [Result.of(cell, found["cells"]) for cell in cells()]
    low = min(one.mean - one.half for one in results)
    high = max(one.mean + one.half for one in results)
    step = 10 ** math.floor(math.log10(high - low)) / 2
    first, last = math.floor(low / step), math.ceil(high / step)

    def x(value: float) -> float:
        return LEFT + (value / step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    groups = [("forward_kl under each encoding", results[: len(ENCODINGS)])]
    groups.append(("each divergence under hidden (exact) labels", [_reference(results), *results[len(ENCODINGS) :]]))
    marks, y = [], TOP
    for title, group in groups:
        marks.append(f'<text class="title" x="8" y="{y}">{title}</text>')
        for one in group:
            y += ROW
            marks += _marks(one, x, y, first=group is groups[0][1])
        y += 2 * ROW
    bottom = y - ROW
    ticks = [_tick(x(i * step), i * step, bottom) for i in range(first, last + 1)]
    caption = f'<text x="{LEFT}" y="{bottom + 34}">{CAPTION}</text>'
    return SVG.format(width=WIDTH, height=bottom + 46, marks="\n".join([*ticks, *marks, caption]))


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif"
  font-size="13">
<style>
:root {{ --ink: #24292f; --faint: #d0d7de; --dot: #0969da; --paper: #ffffff }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6edf3; --faint: #30363d; --dot: #58a6ff; --paper: #0d1117 }}
}}
text {{ fill: var(--ink) }} .title {{ font-weight: 600 }}
.tick {{ stroke: var(--faint) }} .bar {{ stroke: var(--dot); stroke-width: 3 }}
circle {{ fill: var(--dot) }} .paper {{ fill: var(--paper) }}
</style>
<rect class="paper" width="100%" height="100%"/>
{marks}
</svg>
"""


def _reference(results: Sequence[Result]) -> Result:
    return next(one for one in results if one.cell == REFERENCE)


def _marks(one: Result, x: Any, y: int, *, first: bool) -> list[str]:
    name = _plain(one.cell.labels if first else one.cell.objective)
    ends = f'x1="{x(one.mean - one.half):.1f}" x2="{x(one.mean + one.half):.1f}"'
    return [
        f'<text x="{LEFT - 14}" y="{y}" text-anchor="end">{name}</text>',
        f'<line class="bar" {ends} y1="{y - 4}" y2="{y - 4}"/>',
        f'<circle cx="{x(one.mean):.1f}" cy="{y - 4}" r="5"><title>{_interval(one)}</title></circle>',
    ]


def _tick(at: float, value: float, bottom: int) -> str:
    return (
        f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP + 8}" y2="{bottom}"/>'
        f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
    )


def _row(one: Result) -> str:
    beside = "" if one.cell == REFERENCE else f"{one.difference:+.3f} ± {one.difference_half:.3f}"
    return f"| `{_plain(one.cell.labels)}` | `{_plain(one.cell.objective)}` | {_interval(one)} | {beside} |"


def _interval(one: Result) -> str:
    return f"{one.mean:.3f} ± {one.half:.3f}"


def _plain(one: dict[str, Any]) -> str:
    kind, *values = one.values()
    return " ".join([kind, *(f"{value:g}" for value in values)])


def _how(found: dict[str, Any]) -> str:
    plan, on = found["plan"], date.fromisoformat(found["date"])
    seeds = statistics.mode(len(values) for values in found["cells"].values())
    return (
        f"Measured on {on.day} {on:%B %Y} on a processor ({found['processor']}), float32, one process: teacher "
        f"`{plan['teacher']}`, student `{plan['student']}` with frozen embeddings, {plan['steps']} steps of "
        f"{plan['sequences_per_step']} texts of the demo, learning rate {plan['learning_rate']:g}, {seeds} seeds, "
        f"{plan['num_held_out']} held-out answers. Before training the KL is {found['before']:.3f}. After so few steps "
        "it is how fast a student learns that differs, not where it ends; other models and texts may order the kinds "
        "otherwise."
    )


if __name__ == "__main__":
    PAGE.write_text(results_table(), encoding="utf-8")
    PICTURE.write_text(picture(), encoding="utf-8")
