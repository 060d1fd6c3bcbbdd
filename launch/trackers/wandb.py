"""Weights & Biases. Its history is append-only: a run that goes on under its id keeps the points that were sent before
the stop, and continues after them."""

from __future__ import annotations

import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configs.trackers import DEFAULT_PROJECT, Wandb
from launch.trackers.protocol import Ending, Point, RunFacts
from launch.trackers.reaching import answers

SERVICE = "https://api.wandb.ai"
BEGIN_S = 20


class Tracker(Wandb):
    """Which project, and whether over the network."""

    @property
    def in_mode(self) -> str:
        return self.mode or os.environ.get("WANDB_MODE") or "online"

    def reach(self) -> None:
        if self.in_mode != "online":
            return
        url = os.environ.get("WANDB_BASE_URL") or SERVICE
        if not _has_key(url):
            raise ValueError(f"no key for {url}: run `wandb login`, set WANDB_API_KEY, or write mode: offline")
        answers(url)

    def begin(self, run: RunFacts) -> History:
        self.reach()  # the library itself would ask for a key, and wait
        import wandb

        settings = wandb.Settings(
            console="off",
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_stats=True,
            silent=True,
            init_timeout=BEGIN_S,
        )
        try:
            made = wandb.init(
                project=self.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
                entity=self.entity,
                group=self.group,
                tags=list(self.tags) or None,
                mode=self.in_mode,
                id=run.id,
                name=run.name,
                dir=str(run.folder),
                config=dict(run.config),
                resume="allow",
                settings=settings,
            )
        except Exception:
            wandb.teardown(1)  # its helper process would say at the next attempt that the id is in use
            raise
        return History(made, online=self.in_mode == "online")


class History:
    """`TrackedRun`: the history of a wandb run."""

    def __init__(self, run: Any, *, online: bool) -> None:
        self._run = run
        self.held = run.starting_step - 1 if online else None
        starts = Path(run.settings.sync_dir).with_name("offline-run-*")  # all of the run: they are sent in their order
        self.where = run.url if online else f"wandb sync {starts}"

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, "_timestamp": point.time_s}, step=point.step)

    def rewind(self, step: int) -> bool:
        return False

    def close(self, ending: Ending | None) -> None:
        import wandb

        if ending is not None:
            self._run.summary.update({"end/exit_code": ending.code, "end/reason": ending.reason, **ending.summary})
        code = 1 if ending is None else ending.code
        self._run.finish(exit_code=code)
        wandb.teardown(code)


def _has_key(url: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
