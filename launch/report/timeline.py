"""Who was busy when, as a picture, and which share of the steady state each waited.

Steady state: from the end of the first tenth of the steps (at least one) to the end of the last one, without the time
in which the student evaluated, saved or started and the pauses between two attempts of the run: those stop the line,
they do not say which side limits it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import get_args

import numpy as np
from markupsafe import Markup

from launch.report.intervals import Interval, elapsed_inside, seconds_inside, subtract, union
from launch.report.metrics import SpanKind
from launch.report.numbers import duration
from trainer.records import Moment, checked, ignore, read_lines
from trainer.run_folder import RunFolder

WIDTH, LEFT, RIGHT, TOP, LANE, GAP, BOTTOM = 1160, 96, 10, 8, 34, 12, 30
BINS = 260
MAX_DRAWN_SPANS = 500
"""More than that and single spans are thinner than a pixel: the picture then shows shares per slice of time."""
KINDS = get_args(SpanKind)
MIN_STEPS = 5
"""Shares of fewer steps would say how the run began."""
_ROWS = 3
"""Overlapping spans of a lane are drawn on so many rows at most."""


@dataclass(frozen=True, slots=True)
class Span:
    """One line of timeline.jsonl; wall clock seconds."""

    lane: str
    kind: str
    start_s: Moment
    stop_s: Moment
    label: str = ""


@dataclass(frozen=True, slots=True)
class LaneShare:
    """Shares of the steady state. `waiting` = 1 - `busy`; kinds may overlap, so their shares need not add up."""

    lane: str
    is_student: bool
    busy: float
    waiting: float
    kinds: Mapping[str, float]


def read_timeline(folder: RunFolder, *, tell: Callable[[str], None] = ignore) -> tuple[Span, ...]:
    """In the order of their start; see `launch.report.metrics.Timeline` for the format. `tell` gets a sentence
    for each bad line. Raises OSError."""
    found = read_lines(folder.timeline, lambda record: checked(record, Span), tell=tell)
    return tuple(sorted(found, key=lambda span: span.start_s))


def steady_windows(spans: Sequence[Span]) -> list[Interval]:
    """The steady state as disjoint intervals; empty before there are `MIN_STEPS` train spans."""
    trained = sorted(span.stop_s for span in spans if span.kind == "train")
    skipped = max(1, len(trained) // 10)
    if len(trained) < MIN_STEPS:
        return []
    stops_the_line = [
        (s.start_s, s.stop_s) for s in spans if is_student(s.lane) and s.kind in ("evaluate", "save", "start")
    ]
    whole = (trained[skipped - 1], trained[-1])
    in_the_loop = union((s.start_s, s.stop_s) for s in spans if is_student(s.lane) and s.kind in ("train", "wait"))
    # Outside lies what a start of the run does before its first step, and the time until it was started again.
    return subtract(whole, [*stops_the_line, *subtract(whole, in_the_loop)])


def wait_shares(spans: Sequence[Span]) -> tuple[LaneShare, ...]:
    """Student first, then teachers by name; empty before there is a steady state."""
    windows = steady_windows(spans)
    length = sum(stop - start for start, stop in windows)
    if length <= 0:
        return ()
    shares = []
    for lane in sorted({s.lane for s in spans}, key=lambda lane: (not is_student(lane), lane)):
        kinds = {
            kind: seconds_inside(_of(spans, lane, kind), windows) / length for kind in KINDS if _of(spans, lane, kind)
        }
        working = [i for kind in KINDS if kind not in ("wait", "stage") for i in _of(spans, lane, kind)]
        busy = seconds_inside(working, windows) / length
        shares.append(LaneShare(lane=lane, is_student=is_student(lane), busy=busy, waiting=1.0 - busy, kinds=kinds))
    return tuple(shares)


def mean_waiting(shares: Sequence[LaneShare], *, student: bool) -> float | None:
    """Over the lanes of the student's ranks, or of the teachers; None where there is none."""
    sides = [share for share in shares if not share.lane.startswith("rollout")]
    waiting = [share.waiting for share in sides if share.is_student == student]
    return sum(waiting) / len(waiting) if waiting else None


def is_student(lane: str) -> bool:
    return lane.startswith("student")


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """Wall clock to pixels, without the long pauses between two attempts of a run."""

    segments: tuple[Interval, ...]

    @classmethod
    def of(cls, spans: Sequence[Span]) -> TimeAxis:
        covered = union((span.start_s, span.stop_s) for span in spans)
        pause = max(30.0, 0.05 * sum(stop - start for start, stop in covered))
        segments: list[Interval] = []
        for start, stop in covered:
            if segments and start - segments[-1][1] <= pause:
                segments[-1] = (segments[-1][0], stop)
            else:
                segments.append((start, stop))
        return cls(tuple(segments))

    @property
    def length_s(self) -> float:
        return sum(stop - start for start, stop in self.segments)

    def pixel(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        return LEFT + elapsed_inside(self.segments, times) / self.length_s * (WIDTH - LEFT - RIGHT)

    def wall_clock(self, elapsed: np.ndarray) -> np.ndarray:
        """The inverse of "elapsed seconds on this axis"."""
        borders = np.array(self.segments)
        done = np.concatenate([[0.0], np.cumsum(borders[:, 1] - borders[:, 0])])
        return np.interp(elapsed, np.stack([done[:-1], done[1:]], axis=1).ravel(), borders.ravel())


def draw(spans: Sequence[Span]) -> list[tuple[str, Markup]]:
    """(caption, picture): the whole run, and a close-up of a few steps where the whole is too dense to draw."""
    spans = [span for span in spans if span.stop_s > span.start_s]
    if not spans:
        return []
    if len(spans) <= MAX_DRAWN_SPANS:
        return [("The whole run, every phase", _gantt(spans, spans))]
    pictures = [("The whole run: share of each slice of time spent on", _utilisation(spans))]
    close = _middle_steps(spans)
    if close:
        pictures.append(("A close-up of a few steps in the middle", _gantt(close, spans)))
    return pictures


def kinds_present(spans: Sequence[Span]) -> list[str]:
    return [kind for kind in KINDS if any(span.kind == kind for span in spans)]


def _middle_steps(spans: Sequence[Span], steps: int = 8) -> list[Span]:
    trained = [span for span in spans if span.kind == "train"]
    if len(trained) < steps:
        return []
    first = (len(trained) - steps) * 2 // 5
    start, stop = trained[first].start_s, trained[first + steps - 1].stop_s
    return [
        Span(s.lane, s.kind, max(s.start_s, start), min(s.stop_s, stop), s.label)
        for s in spans
        if s.stop_s > start and s.start_s < stop
    ]


def _gantt(shown: Sequence[Span], everything: Sequence[Span]) -> Markup:
    axis, lanes = TimeAxis.of(shown), _lanes(everything)
    parts = []
    for index, lane in enumerate(lanes):
        top = TOP + index * (LANE + GAP)
        mine = [span for span in shown if span.lane == lane]
        rows = _rows([span for span in mine if span.kind not in ("wait", "stage")])
        height = LANE / max(1, 1 + max((row for _, row in rows), default=0))
        parts += [_bar(axis, span, top + LANE * 0.35, LANE * 0.3) for span in mine if span.kind == "wait"]
        parts += [_bar(axis, span, top + row * height, height - 1) for span, row in rows]
        parts += [_bar(axis, span, top + LANE - 1, GAP * 0.5) for span in mine if span.kind == "stage"]
    return _frame(axis, lanes, "".join(parts))


def _bar(axis: TimeAxis, span: Span, y: float, height: float) -> str:
    left, right = axis.pixel([span.start_s, span.stop_s])
    text = f"{span.kind} {span.label}".strip() + f": {span.stop_s - span.start_s:.2f} s"
    return (
        f'<rect class="k-{escape(span.kind)}" x="{left:.1f}" y="{y:.1f}" width="{max(right - left, 0.8):.1f}" '
        f'height="{height:.1f}" rx="1.5"><title>{escape(text)}</title></rect>'
    )


def _rows(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """A row for each span so that spans of a row do not overlap, as far as `_ROWS` rows go."""
    free_from = [-np.inf] * _ROWS
    placed = []
    for span in spans:
        row = next((r for r in range(_ROWS) if free_from[r] <= span.start_s), int(np.argmin(free_from)))
        free_from[row] = max(free_from[row], span.stop_s)
        placed.append((span, row))
    return placed


def _utilisation(spans: Sequence[Span]) -> Markup:
    axis, lanes = TimeAxis.of(spans), _lanes(spans)
    edges = axis.wall_clock(np.linspace(0, axis.length_s, BINS + 1))
    pixels = axis.pixel(edges)
    slice_s = axis.length_s / BINS
    parts = []
    for index, lane in enumerate(lanes):
        bottom = TOP + index * (LANE + GAP) + LANE
        parts.append(
            f'<rect class="lane" x="{LEFT}" y="{bottom - LANE}" width="{WIDTH - LEFT - RIGHT}" height="{LANE}"/>'
        )
        filled = np.zeros(BINS)
        for kind in (kind for kind in KINDS if kind not in ("wait", "stage")):
            share = np.diff(elapsed_inside(_of(spans, lane, kind), edges)) / slice_s
            share = np.minimum(share, 1.0 - filled)
            for k in np.flatnonzero(share > 0.005):
                top, height = bottom - LANE * (filled[k] + share[k]), LANE * share[k]
                parts.append(
                    f'<rect class="k-{kind}" x="{pixels[k]:.1f}" y="{top:.1f}" '
                    f'width="{pixels[k + 1] - pixels[k] + 0.3:.1f}" height="{height:.1f}"/>'
                )
            filled += share
    return _frame(axis, lanes, "".join(parts))


def _frame(axis: TimeAxis, lanes: Sequence[str], content: str) -> Markup:
    height = TOP + len(lanes) * (LANE + GAP) + BOTTOM
    base = height - BOTTOM
    names = "".join(
        f'<text x="{LEFT - 10}" y="{TOP + i * (LANE + GAP) + LANE / 2 + 5:.0f}" text-anchor="end">{escape(lane)}</text>'
        for i, lane in enumerate(lanes)
    )
    marks = []
    for share in np.linspace(0, 1, 6):
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        elapsed = axis.length_s * share
        text = f"{elapsed:.1f} s" if axis.length_s < 30 else duration(elapsed)
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}"/>')
        marks.append(f'<text class="dim" x="{x:.1f}" y="{base + 18}" text-anchor="{anchor}">{text}</text>')
    for before, after in pairwise(axis.segments):
        x = float(axis.pixel([after[0]])[0])
        pause = escape(duration(after[0] - before[1]))
        marks.append(
            f'<line class="pause" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{base}">'
            f"<title>paused for {pause}</title></line>"
        )
    label = f"Timeline of {', '.join(lanes)} over {duration(axis.length_s)}"
    return Markup(
        f'<svg class="timeline" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(marks)}{names}{content}</svg>"
    )


def _lanes(spans: Sequence[Span]) -> list[str]:
    """Student on top, then teachers by name."""
    return sorted({span.lane for span in spans}, key=lambda lane: (not is_student(lane), lane))


def _of(spans: Sequence[Span], lane: str, kind: str) -> list[Interval]:
    return [(span.start_s, span.stop_s) for span in spans if span.lane == lane and span.kind == kind]
