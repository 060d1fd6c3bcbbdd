"""The hours of a run: how many are left, and how many its devices were held, over all its starts.

What is left follows from the run itself: the median of the last steps, and what evaluations and checkpoints still due
took at the median. Nothing is said before enough steps are known.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from launch.report.numbers import compact, duration
from trainer.loop.settings import LoopSettings

LEFT, USED, EXPECTED = "run/left_s", "run/device_hours", "run/device_hours_expected"
STEP_SECONDS = "step/seconds"

_WINDOW = 20
"""Steps whose median says how long the next ones take."""

_FEWEST = 4
"""Steps before anything is said: the first compiles, fills caches and waits for what others had ahead."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What a run holds from its start to its end."""

    count: int
    kind: str  # GPU or core


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run, as the manifest keeps it."""

    began: float
    ended: float | None
    devices: int
    kind: str

    @property
    def device_s(self) -> float:
        return 0.0 if self.ended is None else max(0.0, self.ended - self.began) * self.devices


class Hours:
    """Of a run that goes on: `of_step` gives the values that a step's record gets."""

    def __init__(
        self,
        settings: LoopSettings,
        devices: Devices,
        *,
        began: float,
        earlier: Iterable[Attempt] = (),
        costs: Mapping[str, Sequence[float]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`began`: when this start held its devices; `costs`: seconds of earlier evaluations and saves, by kind."""
        self._settings = settings
        self.devices = devices
        self._began = began
        self._earlier_s = sum(attempt.device_s for attempt in earlier)
        self._costs = defaultdict(list, {kind: list(seconds) for kind, seconds in (costs or {}).items()})
        self._steps: deque[float] = deque(maxlen=_WINDOW)
        self._clock = clock

    def took(self, kind: str, seconds: float) -> None:
        """A span of the student: `evaluate` and `save` count."""
        self._costs[kind].append(seconds)

    def of_step(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Seconds that are left, device-hours so far, and those expected in all."""
        if STEP_SECONDS in values:
            self._steps.append(values[STEP_SECONDS])
        used_s = self._earlier_s + self.devices.count * max(0.0, self._clock() - self._began)
        known = {USED: used_s / 3600}
        if len(self._steps) < _FEWEST:
            return known
        left_s = self._left_s(step)
        return known | {LEFT: left_s, EXPECTED: (used_s + self.devices.count * left_s) / 3600}

    def _left_s(self, step: int) -> float:
        settings = self._settings
        left = settings.total_steps - step
        seconds = left * median(self._steps)
        if settings.has_held_out_rows:
            seconds += _due(step, settings.total_steps, settings.evaluate_every) * self._cost("evaluate")
        saves = _due(step, settings.total_steps, settings.save_every)
        if settings.save_every_s:
            saves += int(seconds / settings.save_every_s)
        return seconds + saves * self._cost("save")

    def _cost(self, kind: str) -> float:
        return median(self._costs[kind]) if self._costs[kind] else 0.0


def _due(step: int, total: int, every: int) -> int:
    """How often something that is done every so many steps, and after the last, is still to be done."""
    regular = total // every - step // every if every else 0
    return regular + (step < total and not (every and total % every == 0))


def left_text(values: Mapping[str, float]) -> str:
    """`ETA 1 h 05 min`, once it is known."""
    left = values.get(LEFT)
    return f"ETA {duration(left)}" if left is not None and math.isfinite(left) else "ETA -"


def hours_text(values: Mapping[str, float], kind: str) -> str:
    """`3.2 of 41 GPU-hours`."""
    used, expected = values.get(USED), values.get(EXPECTED)
    if used is None or expected is None:
        return ""
    return f"{compact(used, 2)} of {compact(expected, 2)} {kind}-hours"


# --- in the manifest --------------------------------------------------------------------------------------------------


def read_attempts(manifest: Mapping[str, Any], *, last_seen: float | None = None) -> list[Attempt]:
    """Those of a manifest; one that was killed ended when it was `last_seen`."""
    found = []
    for one in manifest.get("attempts") or ():
        ended = one["ended"] if one["ended"] is not None else max(one["began"], last_seen or 0.0)
        found.append(Attempt(one["began"], ended, one["devices"], one["kind"]))
    return found


def spent(attempts: Sequence[Attempt]) -> str:
    """`1 h 05 min, 8.7 GPU-hours on 8 GPUs, in 2 starts`; "" where nothing is known."""
    if not attempts:
        return ""
    last, seconds = attempts[-1], sum((a.ended or a.began) - a.began for a in attempts)
    hours = sum(a.device_s for a in attempts) / 3600
    plural = "s" if last.devices > 1 else ""
    starts = f", in {len(attempts)} starts" if len(attempts) > 1 else ""
    return f"{duration(seconds)}, {compact(hours, 2)} {last.kind}-hours on {last.devices} {last.kind}{plural}{starts}"
