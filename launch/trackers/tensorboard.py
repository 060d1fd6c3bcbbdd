"""TensorBoard: event files. A run that goes on purges what was written after its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.trackers import TensorBoard
from launch.trackers.protocol import Ending, Point, RunFacts


class Tracker(TensorBoard):
    """The folder of the event files."""

    def reach(self) -> None:
        if self.folder is not None:
            from cluster.preflight.machine import writable  # for `check`: the process that writes needs none of it

            found = writable("folder", self.folder)
            if found.fatal:
                raise OSError(found.text)

    def begin(self, run: RunFacts) -> EventFiles:
        return EventFiles(self.folder or run.folder / "tensorboard", run)


class EventFiles:
    """`TrackedRun`: an event file of its own for each attempt."""

    held = None

    def __init__(self, folder: Path, run: RunFacts) -> None:
        self.where = f"tensorboard --logdir {folder}"
        self._folder = folder
        self._config = json.dumps(run.config, indent=1)
        self._writer = self._open(None)

    def _open(self, purge_step: int | None) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        writer = EventFileWriter(str(self._folder))
        if purge_step is not None:
            writer.add_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        return writer

    def log(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self._writer.add_event(Event(step=point.step, wall_time=point.time_s, summary=Summary(value=values)))
        self._writer.flush()

    def rewind(self, step: int) -> bool:
        self._writer.close()
        self._writer = self._open(step + 1)
        return True

    def close(self, ending: Ending | None) -> None:
        self._writer.close()
