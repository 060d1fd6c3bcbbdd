"""Trackio. It has no way to take points back: a run that goes on under its name keeps what was logged before the stop,
and continues after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.trackers import Trackio
from launch.trackers.protocol import Ending, Point, RunFacts
from launch.trackers.reaching import answers


class Tracker(Trackio):
    """Which project, and where it lies."""

    def reach(self) -> None:
        if self.server_url is not None:
            answers(self.server_url)
        elif self.space_id is not None:
            from huggingface_hub import HfApi

            HfApi().whoami()

    def begin(self, run: RunFacts) -> TrackioRun:
        self.reach()  # the library itself would only print, and keep what it cannot send
        import trackio

        made = trackio.init(
            project=self.project,
            name=run.id,
            group=self.group,
            space_id=self.space_id,
            server_url=self.server_url,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        shown = self.server_url or self.space_id
        return TrackioRun(made, where=shown or f"trackio show --project {self.project}", server_url=self.server_url)


class TrackioRun:
    """`TrackedRun`: a run of that name. The library sends in a thread of its own, and keeps on disk what it cannot."""

    held = None

    def __init__(self, run: Any, *, where: str, server_url: str | None) -> None:
        self._run = run
        self._server_url = server_url
        self.where = where

    def log(self, points: Sequence[Point]) -> None:
        if self._server_url is not None:
            answers(self._server_url)  # the library would keep the points, and tell nobody
        for point in points:
            self._run.log(dict(point.values), step=point.step)

    def rewind(self, step: int) -> bool:
        return False

    def close(self, ending: Ending | None) -> None:
        self._run.finish()
