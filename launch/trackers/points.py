"""metrics.jsonl while it is written: the points that are new, and what of them was sent."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.trackers.protocol import Point
from trainer.errors import ConfigError
from trainer.records import read_record
from trainer.run_folder import write_json

_NO_VALUES = ("time", "kind", "step", "non_finite")


class NewPoints:
    """The points of a log that another process appends to, and now and then replaces by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def from_the_start(self) -> None:
        """The file was replaced."""
        self._offset = 0

    def read(self) -> Iterator[Point]:
        """Those of complete lines that were not read before; lines that are no record are left out."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self._offset += len(line)
                point = point_of(line)
                if point is not None:
                    yield point


def point_of(line: bytes) -> Point | None:
    """None for an event, and for what is no record of the log."""
    try:
        record = json.loads(line)
        kind, step, time_s = record["kind"], record["step"], record["time"]
        not_finite = record.get("non_finite", {})
        values = {
            name: float(not_finite.get(name, math.nan)) if value is None else float(value)
            for name, value in record.items()
            if name not in _NO_VALUES and kind != "event"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if kind not in ("step", "evaluation") or type(step) is not int:
        return None
    return Point(kind, step, float(time_s), values)


@dataclass(slots=True)
class Sent:
    """What a tracker was sent of a run: a record in the run folder."""

    id: str = ""
    destination: Mapping[str, Any] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)  # kind of point -> the last step

    @classmethod
    def read(cls, path: Path, *, id: str, destination: Mapping[str, Any]) -> Sent:
        """Nothing was sent where the record is of another run or of another place, or cannot be read."""
        with contextlib.suppress(FileNotFoundError, ConfigError, OSError):
            found = read_record(path, cls)
            if (found.id, dict(found.destination)) == (id, dict(destination)):
                return found
        return cls(id, destination)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    def has(self, point: Point) -> bool:
        return point.step <= self.last.get(point.kind, -1)

    def add(self, point: Point) -> None:
        self.last[point.kind] = point.step

    def cut(self, step: int) -> None:
        """Later steps are to be sent again."""
        self.last = {kind: min(last, step) for kind, last in self.last.items()}

    @property
    def step(self) -> int:
        """The last of any kind; -1 for nothing."""
        return max(self.last.values(), default=-1)
