"""Line charts as inline SVG: they follow the page's light and dark colours, print sharply and load nothing.

Series are thinned to buckets of neighbouring steps: the line is the mean, the band the range of the bucket, so that a
long run keeps its spikes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from markupsafe import Markup

from launch.report.numbers import Form, axis_texts, compact

WIDTH, HEIGHT, RIGHT, TOP, BOTTOM = 400, 230, 14, 12, 36
CHARACTER = 8.6
"""Widest advance of a digit at the style sheet's size of chart text."""
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
        """Round numbers inside the axis, not many more than `count`."""
        if not self.log:
            return ticks(self.low, self.high, count)
        lowest, highest = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        stride = max(1, math.ceil((highest - lowest) / (count + 1)))
        if stride > 1:
            return [10.0**p for p in range(lowest, highest + 1, stride) if self.low <= 10.0**p <= self.high]
        powers = range(lowest, highest + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [f * 10.0**p for p in powers for f in factors if self.low <= f * 10.0**p <= self.high]
            if len(found) >= 3:
                break
        return found


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    from_zero: bool = False,
    logarithmic: bool = False,
    form: Form = compact,
) -> Markup:
    """One `<figure>`; empty where no series has a value, and a sentence where no value is finite.

    `form` writes y values for people. `logarithmic` holds where all values are positive and the largest is ten times
    the smallest or more.
    """
    thinned = [(one, thin(one)) for one in series]
    drawn = [(one, points) for one, points in thinned if len(points.x)]
    if not drawn:
        return _nothing_finite(title, sum(len(one.y) for one in series))
    x_axis, y_axis = _scales(thinned, from_zero=from_zero, logarithmic=logarithmic, form=form)
    parts = [_grid(x_axis, y_axis, form)]
    parts += [_line(one, points, x_axis, y_axis) for one, points in thinned]
    hover = [
        {
            "name": one.name,
            "x": [round(x_axis(float(v)), 1) for v in points.x],
            "y": [round(y_axis(float(v)), 1) for v in points.mean],
            "step": [f"{v:,.0f}" for v in points.x],
            "text": [form(float(v), 3) for v in points.mean],
            "colour": one.colour,
        }
        for one, points in drawn
    ]
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)}{_legend([one for one, _ in drawn])}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_describe(title, drawn, form))}" '
        f'data-hover="{escape(json.dumps(hover))}" data-bottom="{HEIGHT - BOTTOM}">'
        f'{"".join(parts)}<g class="cursor"></g></svg></figure>'
    )


def _nothing_finite(title: str, num_values: int) -> Markup:
    if not num_values:
        return Markup("")
    text = f"None of the {num_values:,} values is finite."
    return Markup(f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="hint">{text}</p></figure>')


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


def _scales(
    drawn: list[tuple[Series, Thinned]], *, from_zero: bool, logarithmic: bool, form: Form
) -> tuple[Scale, Scale]:
    """The axis of steps begins where the numbers of the other one end, whatever they are."""
    finite = [points for _, points in drawn if len(points.x)]
    low, high = min(points.low.min() for points in finite), max(points.high.max() for points in finite)
    if logarithmic and low > 0 and high >= 10 * low:
        y_axis = Scale(low / 1.2, high * 1.2, HEIGHT - BOTTOM, TOP, log=True)
    else:
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high == 0:
            high = 1.0
        margin = max(0.06 * (high - low), 0.1 * abs(high) if high == low else 1e-6 * max(abs(low), abs(high)), 1e-12)
        y_axis = Scale(low if from_zero and low == 0 else low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    steps = np.concatenate([of for _, points in drawn for of in (points.x, points.missing)])
    first, last = float(steps.min()), float(steps.max())
    if first == last:
        first, last = max(first - 1, 0.0), last + 1
    longest = max((len(text) for text in axis_texts(y_axis.ticks(4), form)), default=0)
    return Scale(first, last, max(44.0, 12 + CHARACTER * longest), WIDTH - RIGHT), y_axis


def _grid(x_axis: Scale, y_axis: Scale, form: Form) -> str:
    parts = []
    left, right, base = x_axis.start, x_axis.stop, HEIGHT - BOTTOM
    values = y_axis.ticks(4)
    for value, text in zip(values, axis_texts(values, form), strict=True):
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    whole = [value for value in x_axis.ticks(4) if value == int(value)]
    for value, text in zip(whole, axis_texts(whole, compact), strict=True):
        half = CHARACTER * len(text) / 2
        x = min(x_axis(value), WIDTH - half)
        parts.append(f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{escape(text)}</text>')
    parts.append(f'<line class="axis" x1="{left:.1f}" x2="{right}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="dim" x="{right}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    return "".join(parts)


def _line(series: Series, points: Thinned, x_axis: Scale, y_axis: Scale) -> str:
    if not len(points.x):
        return _missing(points.missing, x_axis, HEIGHT - BOTTOM)
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
    return "".join(parts) + _missing(points.missing, x_axis, HEIGHT - BOTTOM)


def _missing(steps: np.ndarray, x_axis: Scale, y: int) -> str:
    """A mark for each place where values are not finite; steps that fall on one pixel share it."""
    places: dict[int, list[float]] = {}
    for step in steps:
        places.setdefault(round(x_axis(float(step))), []).append(float(step))
    marks = []
    for x, there in places.items():
        which = f"step {there[0]:,.0f}" if len(there) == 1 else f"{len(there):,} steps from {there[0]:,.0f}"
        marks.append(
            f'<path class="missing" d="M{x - 4},{y} L{x},{y - 8} L{x + 4},{y} z">'
            f"<title>{which}: not finite</title></path>"
        )
    return "".join(marks)


def _legend(series: list[Series]) -> str:
    if len(series) < 2:
        return ""
    keys = (f'<span class="key {s.colour}{" dashed" if s.dashed else ""}">{escape(s.name)}</span>' for s in series)
    return f'<span class="legend">{"".join(keys)}</span>'


def _describe(title: str, drawn: list[tuple[Series, Thinned]], form: Form) -> str:
    """The chart in words, for screen readers."""
    lines = (
        f"{one.name}: {form(float(points.mean[0]), 3)} at step {points.x[0]:,.0f}, "
        f"{form(float(points.mean[-1]), 3)} at step {points.x[-1]:,.0f}"
        for one, points in drawn
    )
    return f"{title}. {'; '.join(lines)}."
