"""Sets of wall-clock intervals and how long they last: what busy and waiting shares are made of.

An interval is `(start_s, stop_s)`. Spans of one replica overlap when it has two units in flight, so time is always
measured on the union.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted and disjoint; empty intervals disappear."""
    merged: list[Interval] = []
    for start, stop in sorted(i for i in intervals if i[1] > i[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def subtract(window: Interval, holes: Iterable[Interval]) -> list[Interval]:
    """What is left of a window without the holes."""
    left, start = [], window[0]
    for hole_start, hole_stop in union(holes):
        if hole_start > start:
            left.append((start, min(hole_start, window[1])))
        start = max(start, hole_stop)
        if start >= window[1]:
            break
    if start < window[1]:
        left.append((start, window[1]))
    return union(left)


def elapsed_inside(intervals: Iterable[Interval], times: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64, for each time: seconds before it that lie inside the union of the intervals."""
    merged = union(intervals)
    if not merged:
        return np.zeros(len(times))
    borders = np.array(merged, dtype=np.float64)
    done = np.concatenate([[0.0], np.cumsum(borders[:, 1] - borders[:, 0])])
    values = np.stack([done[:-1], done[1:]], axis=1)
    return np.interp(times, borders.ravel(), values.ravel())


def seconds_inside(intervals: Iterable[Interval], windows: Iterable[Interval]) -> float:
    """Seconds of the union of the intervals that lie in the union of the windows."""
    edges = [edge for window in union(windows) for edge in window]
    inside = elapsed_inside(intervals, edges)
    return float((inside[1::2] - inside[::2]).sum())
