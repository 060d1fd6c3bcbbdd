"""The status of a run of `stillhouse train`, from its run folder alone: no scheduler knows it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import psutil

from configs.paths import named_path
from launch.jobs import RECORD, RUNS, pace_of, readable, steps_of
from launch.report.artifacts import read_manifest
from launch.targets import JobStatus, State
from trainer.errors import Preempted
from trainer.run_folder import Ending, Owner, RunFolder

KIND = "here"
_ENDINGS: dict[int, State] = {0: "succeeded", 130: "stopped", Preempted.exit_code: "preempted"}


def find_run(run: str) -> RunFolder | None:
    """The run folder that a name or a path means, where it holds a run."""
    for folder in (named_path("RUN", run), RUNS / run):
        if (folder / "config.yaml").is_file():
            return RunFolder(folder)
    return None


def runs_here() -> Iterator[RunFolder]:
    """Every run folder under `runs/` that no job was submitted for."""
    for config in sorted(RUNS.glob("*/config.yaml")):
        if not (config.parent / RECORD).is_file():
            yield RunFolder(config.parent)


def status_of(folder: RunFolder) -> JobStatus:
    """`job` says which process runs it, or did. Of a run on another machine only what it wrote is known."""
    owner, ended, manifest = readable(folder.owner), readable(folder.ending), read_manifest(folder)
    state, message = _state(owner, ended)
    step, total = steps_of(folder)
    counted = total is not None and (step is not None or state == "running")
    return JobStatus(
        job=f"pid {owner.pid}" if owner is not None and state in ("running", "unknown") else "-",
        state=state,
        exit_code=None if ended is None or state in ("running", "unknown") else ended.code,
        step=step or 0 if counted else None,
        steps=total if counted else None,
        message=message,
        name=folder.path.absolute().name,
        submitted=manifest.get("started"),
        pace=pace_of(folder) if state == "running" else "",
    )


def _state(owner: Owner | None, ended: Ending | None) -> tuple[State, str]:
    if owner is not None and owner.host != socket.gethostname():
        return "unknown", f"the run folder is held by {owner.text()}"
    if owner is not None and _lives(owner):
        return "running", ""
    if ended is None:
        return "failed", "its process is gone: killed, or this machine was started again. The same command goes on"
    return _ENDINGS.get(ended.code, "failed"), "" if ended.code == 0 else ended.reason


def _lives(owner: Owner) -> bool:
    """Whether the process that took the folder is there; a later one of the same number is another one."""
    try:
        process = psutil.Process(owner.pid)
        return process.create_time() <= owner.since + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
