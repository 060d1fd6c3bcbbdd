"""The trackers of a run: a process for each (`follower.py`), which the run tells where it goes on, and when it is over.

All that a tracker can cost the run is here: starting processes, a line into a pipe, and at the end `CLOSE_S`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.schema import Run
from configs.secrets import without_secrets
from configs.trackers import TrackerChoice
from trainer.errors import ConfigError, StillhouseError
from trainer.records import read_json
from trainer.run_folder import RunFolder, write_json

CLOSE_S = 20.0
"""For all trackers together, from the end of a run."""
_GRACE_S = 3.0  # of that, to tell what is missing

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "true",
}
"""Libraries report on their users, unless they are told not to."""


class Trackers:
    """Those of one run: `with` it around the run."""

    def __init__(
        self, run: Run, folder: RunFolder, *, goes_on: bool, tell: Callable[[str], None], close_s: float | None = None
    ) -> None:
        """`goes_on`: from a checkpoint. `tell` gets a sentence, from other threads. `close_s`: for `close`; None:
        `CLOSE_S`."""
        self._run = run
        self._folder = folder
        self._tell = tell
        self._id = _id(run, folder, goes_on=goes_on) if run.trackers else ""
        self._close_s = CLOSE_S if close_s is None else close_s
        self._children: list[_Child] = []

    def __enter__(self) -> Trackers:
        for name, choice in zip(names(self._run.trackers), self._run.trackers, strict=True):
            facts = {"id": self._id, "name": self._run.name, "folder": str(self._folder.path.absolute())}
            told = {
                "name": name,
                "parameters": choice.flat(),
                "run": {**facts, "config": self._run.model_dump(mode="json")},
                "close_s": self._close_s - _GRACE_S,
            }
            try:
                self._children.append(_Child(name, told, self._folder.logs / f"tracker-{name}.log", self._tell))
            except OSError as error:
                self._tell(f"{name}: its process cannot be started ({error}); the run goes on without it")
        return self

    def rewound(self, step: int) -> None:
        """metrics.jsonl goes on after this step."""
        for child in self._children:
            child.send({"after": step})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(*_ended_by(error))

    def close(self, code: int, reason: str) -> bool:
        """The run has ended with `code`; whether every tracker has everything."""
        until = time.monotonic() + self._close_s
        said = without_secrets(reason, environment=os.environ)
        ending = {"code": code, "reason": said, "summary": _summary(self._folder)}
        children, self._children = self._children, []
        for child in children:
            child.send({"end": ending})
        complete = [child.wait(until) for child in children]
        return all(complete)


def names(trackers: tuple[TrackerChoice, ...]) -> list[str]:
    """Of each, for people and files: its kind; where there are several of a kind, numbered."""
    kinds, seen, found = Counter(one.kind for one in trackers), Counter[str](), []
    for one in trackers:
        seen[one.kind] += 1
        found.append(one.kind if kinds[one.kind] == 1 else f"{one.kind}-{seen[one.kind]}")
    return found


def _id(run: Run, folder: RunFolder, *, goes_on: bool) -> str:
    """By which trackers know the run. It is kept in the run folder; a run that starts afresh gets another."""
    file = folder.path / "trackers" / "id.json"
    if goes_on:
        with contextlib.suppress(FileNotFoundError, ConfigError, OSError):
            found = read_json(file)
            if isinstance(found, dict) and isinstance(found.get("id"), str):
                return str(found["id"])
    made = f"{run.name}-{secrets.token_hex(4)}"
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"id": made})
    return made


def _ended_by(error: BaseException | None) -> tuple[int, str]:
    """Exit code and reason."""
    if error is None:
        return 0, "finished"
    if isinstance(error, StillhouseError):
        return error.exit_code, str(error).partition("\n")[0]
    interrupted = isinstance(error, KeyboardInterrupt) or type(error).__name__ == "CancelledError"
    return (130, "interrupted") if interrupted else (1, type(error).__name__)


def _summary(folder: RunFolder) -> dict[str, float]:
    """What the whole run came to, once it is counted: `counters` of manifest.json."""
    with contextlib.suppress(FileNotFoundError, ConfigError, OSError, AttributeError):
        counted = read_json(folder.manifest).get("counters", {})
        return {f"total/{name}": value for name, value in counted.items() if isinstance(value, int | float)}
    return {}


class _Child:
    """The process of one tracker."""

    def __init__(self, name: str, told: Mapping[str, Any], log: Path, tell: Callable[[str], None]) -> None:
        self._name = name
        self._log = log
        self._tell = tell
        self._over = False
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.trackers.follower"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**QUIET, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # a terminal's Ctrl-C is for the run, which ends this process
            )
        self._listener = threading.Thread(target=self._listen, daemon=True, name=f"tracker-{name}")
        self._listener.start()
        self.send(told)

    def send(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._over = self._over or "end" in order
        with contextlib.suppress(OSError):  # it is gone, and `_listen` has told
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def wait(self, until: float) -> bool:
        """Until it has ended, or the time is up: then it is ended. Whether it has sent everything."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._tell(f"{self._name}: its process does not end and is killed; metrics.jsonl has everything")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # helpers of its library too
        self._listener.join(_GRACE_S)  # what it told last
        return self._process.wait() == 0

    def _listen(self) -> None:
        """Tell what it tells, and that it is gone where it should not be."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._tell(str(json.loads(line)))
        if not self._over:
            code = self._process.wait()
            self._tell(f"{self._name}: its process ended with code {code}; see {self._log}. The run goes on without it")
