"""A tracker of a user's: appends to a file what it is told, a JSON line each. May fail, hang or keep what it has."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.trackers import TrackerChoice
from launch.trackers.protocol import Ending, Point, RunFacts


class Tracker(TrackerChoice):
    """`trouble`: a file; while it is there, its first word says what becomes of a call."""

    file: Path
    trouble: Path | None = None
    rewinds: bool = True

    def reach(self) -> None:
        self.check()

    def begin(self, run: RunFacts) -> Diary:
        self.check()
        diary = Diary(self)
        diary.write("begin", run.id, run.name, run.config["training"]["steps"] if run.config else None)
        return diary

    def check(self) -> None:
        word = self.trouble.read_text() if self.trouble is not None and self.trouble.exists() else ""
        if word == "raise":
            raise ConnectionError("the diary is locked with password " + os.environ.get("DIARY_PASSWORD", ""))
        if word == "hang":
            time.sleep(3600)
        if word == "die":
            os._exit(7)


class Diary:
    held = None

    def __init__(self, kind: Tracker) -> None:
        self._kind = kind
        self.where = f"less {kind.file}"

    def write(self, *what: Any) -> None:
        with self._kind.file.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def log(self, points: Sequence[Point]) -> None:
        self._kind.check()
        for point in points:
            self.write("log", point.kind, point.step, dict(point.values))

    def rewind(self, step: int) -> bool:
        if self._kind.rewinds:
            self.write("rewind", step)
        return self._kind.rewinds

    def close(self, ending: Ending | None) -> None:
        self._kind.check()
        self.write("close", None if ending is None else [ending.code, ending.reason])
