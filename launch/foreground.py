"""How a run of `stillhouse train` stands, told from its run folder alone: there is no job that could be asked."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from launch.jobs import RECORD, RUNS, last_lines
from launch.targets import JobStatus, State
from trainer.errors import ConfigError, Preempted
from trainer.run_folder import RunFolder, read_json

KIND = "here"
_STEP = re.compile(r'"kind": "step", "step": (\d+)')
_ENDINGS: dict[int, State] = {0: "succeeded", 130: "stopped", Preempted.exit_code: "preempted"}


def find_run(run: str) -> RunFolder | None:
    """The run folder that a name or a path means, where it holds a run."""
    for folder in (Path(run).expanduser(), RUNS / run):
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
    owner, ended, manifest = (_record(file) for file in (folder.lock_owner, folder.exit, folder.manifest))
    state, message = _state(owner, ended)
    step = next(iter(reversed(_STEP.findall(last_lines(folder.metrics)))), None)
    total = manifest.get("total_steps")
    known = isinstance(total, int) and (step is not None or state == "running")
    return JobStatus(
        job=f"pid {owner.get('pid')}" if state in ("running", "unknown") else "-",
        state=state,
        exit_code=None if state in ("running", "unknown") else ended.get("code"),
        step=int(step or 0) if known else None,
        steps=total if known else None,
        message=message,
        name=folder.path.absolute().name,
        submitted=started if isinstance(started := manifest.get("started"), (int, float)) else None,
    )


def _state(owner: dict[str, Any], ended: dict[str, Any]) -> tuple[State, str]:
    if owner and owner.get("host") != socket.gethostname():
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.get("since", 0)))
        return "unknown", f"pid {owner.get('pid')} on host {owner.get('host')} has held the run folder since {since}"
    if owner and _lives(owner):
        return "running", ""
    if not isinstance(ended.get("code"), int):
        return "failed", "its process is gone: killed, or this machine was started again. The same command goes on"
    code = ended["code"]
    return _ENDINGS.get(code, "failed"), "" if code == 0 else str(ended.get("reason", ""))


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process that took the folder is there; a later one of the same number is another one."""
    try:
        process = psutil.Process(int(owner["pid"]))
        return process.create_time() <= owner["since"] + 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _record(file: Path) -> dict[str, Any]:
    """What a run wrote about itself; nothing where there is no such file or it cannot be read."""
    try:
        found = read_json(file)
    except (OSError, ConfigError):
        return {}
    return found if isinstance(found, dict) else {}
