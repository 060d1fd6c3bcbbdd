"""Line charts as inline SVG: they follow the page's light and dark colours, print sharply and load nothing.

Series are thinned to buckets of neighbouring steps: the line is the mean, the band the range of the bucket, so that a
long run keeps its spikes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from markupsafe import Markup

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 58, 14, 12, 34
MAX_POINTS = 240


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `colour` is a class of the style sheet: `student`, `teacher`, `c2`, `c3` ..."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]  # NaN: a gap, marked at the bottom of the chart
    colour: str = "student"
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True, slots=True)
class Thinned:
    """Means and ranges of buckets, each [P]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    missing: np.ndarray  # x of the values that are not finite


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values of one axis to pixels; logarithmic if `log`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers inside the axis."""
        if not self.log:
            return ticks(self.low, self.high, count)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [f * 10.0**p for p in powers for f in factors if self.low <= f * 10.0**p <= self.high]
            if len(found) >= 3:
                break
        return found


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    height: int = 230,
    from_zero: bool = False,
    logarithmic: bool = False,
    form: Callable[[float], str] | None = None,
    x_label: str = "step",
) -> Markup:
    """One `<figure>`; empty where no series has a finite value. `form` writes y values for people.

    `logarithmic` holds where all values are positive and the largest is ten times the smallest or more.
    """
    drawn = [(one, thin(one)) for one in series]
    drawn = [(one, points) for one, points in drawn if len(points.x)]
    if not drawn:
        return Markup("")
    form = form or compact
    x_axis, y_axis = _scales(drawn, height=height, from_zero=from_zero, logarithmic=logarithmic)
    parts = [_grid(x_axis, y_axis, form, x_label, height)]
    parts += [_line(one, points, x_axis, y_axis, height) for one, points in drawn]
    hover = [
        {
            "name": one.name,
            "x": [round(x_axis(float(v)), 1) for v in points.x],
            "y": [round(y_axis(float(v)), 1) for v in points.mean],
            "step": [compact(round(float(v))) for v in points.x],
            "text": [form(float(v)) for v in points.mean],
            "colour": one.colour,
        }
        for one, points in drawn
    ]
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)}{_legend([one for one, _ in drawn])}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(_describe(title, drawn, form))}" '
        f'data-hover="{escape(json.dumps(hover))}" data-bottom="{height - BOTTOM}" data-x-label="{escape(x_label)}">'
        f'{"".join(parts)}<g class="cursor"></g></svg></figure>'
    )


def thin(series: Series) -> Thinned:
    """At most `MAX_POINTS` buckets of equal numbers of points; the first and last point stay themselves."""
    x, y = np.array(series.x, dtype=np.float64), np.array(series.y, dtype=np.float64)
    finite = np.isfinite(y)
    missing, x, y = x[~finite], x[finite], y[finite]
    if len(x) <= MAX_POINTS:
        return Thinned(x=x, mean=y, low=y, high=y, missing=missing)
    inner = np.array_split(np.arange(1, len(x) - 1), MAX_POINTS - 2)
    buckets = [np.array([0]), *inner, np.array([len(x) - 1])]
    return Thinned(
        x=np.array([x[b].mean() for b in buckets]),
        mean=np.array([y[b].mean() for b in buckets]),
        low=np.array([y[b].min() for b in buckets]),
        high=np.array([y[b].max() for b in buckets]),
        missing=missing,
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def compact(value: float) -> str:
    """A number for people: `0.0006`, `2.41`, `1,234`, `1.2M`."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:,.3g}M"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-4 else f"{value:.1e}"


def percent(value: float) -> str:
    digits = 0 if value == 0 or abs(value) >= 0.0995 else 1
    return f"{100 * value:.{digits}f} %"


def _scales(
    drawn: list[tuple[Series, Thinned]], *, height: int, from_zero: bool, logarithmic: bool
) -> tuple[Scale, Scale]:
    x_low = min(points.x.min() for _, points in drawn)
    x_high = max(points.x.max() for _, points in drawn)
    low = min(points.low.min() for _, points in drawn)
    high = max(points.high.max() for _, points in drawn)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    x_axis = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    if logarithmic and low > 0 and high >= 10 * low:
        return x_axis, Scale(low / 1.2, high * 1.2, height - BOTTOM, TOP, log=True)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.06 * (high - low) or max(abs(high) * 0.1, 1e-9)
    low, high = (low if from_zero and low == 0 else low - margin), high + margin
    return x_axis, Scale(low, high, height - BOTTOM, TOP)


def _grid(x_axis: Scale, y_axis: Scale, form: Callable[[float], str], x_label: str, height: int) -> str:
    parts = []
    for value in y_axis.ticks(4):
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(form(value))}</text>')
    base = height - BOTTOM
    for value in x_axis.ticks(6):
        if value == int(value):
            parts.append(
                f'<text x="{x_axis(value):.1f}" y="{base + 17}" text-anchor="middle">{escape(compact(value))}</text>'
            )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="dim" x="{WIDTH - RIGHT}" y="{height - 3}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def _line(series: Series, points: Thinned, x_axis: Scale, y_axis: Scale, height: int) -> str:
    xs = [f"{x_axis(float(v)):.1f}" for v in points.x]
    middle = [f"{y_axis(float(v)):.1f}" for v in points.mean]
    parts = []
    if (points.high > points.low).any():
        upper = [f"{x},{y_axis(float(v)):.1f}" for x, v in zip(xs, points.high, strict=True)]
        lower = [f"{x},{y_axis(float(v)):.1f}" for x, v in zip(xs, points.low, strict=True)]
        parts.append(f'<polygon class="band {series.colour}" points="{" ".join(upper + lower[::-1])}"/>')
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    path = " ".join(f"{x},{y}" for x, y in zip(xs, middle, strict=True))
    parts.append(f'<polyline class="line {series.colour}" points="{path}"{dash}/>')
    if series.markers or len(xs) == 1:
        parts += [
            f'<circle class="dot {series.colour}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in zip(xs, middle, strict=True)
        ]
    for value in points.missing:
        x, y = x_axis(float(value)), height - BOTTOM
        parts.append(
            f'<path class="missing" d="M{x - 4:.1f},{y} L{x:.1f},{y - 8} L{x + 4:.1f},{y} z">'
            f"<title>step {compact(float(value))}: not finite</title></path>"
        )
    return "".join(parts)


def _legend(series: list[Series]) -> str:
    if len(series) < 2:
        return ""
    keys = (f'<span class="key {s.colour}{" dashed" if s.dashed else ""}">{escape(s.name)}</span>' for s in series)
    return f'<span class="legend">{"".join(keys)}</span>'


def _describe(title: str, drawn: list[tuple[Series, Thinned]], form: Callable[[float], str]) -> str:
    """What the picture says, for whoever cannot see it."""
    lines = (
        f"{one.name}: {form(float(points.mean[0]))} at step {compact(float(points.x[0]))}, "
        f"{form(float(points.mean[-1]))} at step {compact(float(points.x[-1]))}"
        for one, points in drawn
    )
    return f"{title}. {'; '.join(lines)}."
