"""The guard of a Ray session: it cleans up when it is let go, and when its owner is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.guard import SESSION, Guard, members

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (SESSION, "SPT_NOENV"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "session"
    (folder / "logs").mkdir(parents=True)
    return folder


def gone(pid: int, timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_letting_go_removes_the_folder_and_ends_what_belongs_to_it(session: Path) -> None:
    other = subprocess.Popen(SLEEP)
    guard = Guard.of(str(session), grace_s=0.2)
    marked = subprocess.Popen(SLEEP, start_new_session=True)
    unmarked = {**os.environ, SESSION: f"{session}-2"}
    with (session / "logs" / "a.log").open("w") as log:
        holding = subprocess.Popen(SLEEP, env=unmarked, stdout=log)
    found = set(members(str(session), {os.getpid()}))
    assert found >= {marked.pid, holding.pid}
    assert other.pid not in found
    guard.release()
    assert not session.exists()
    assert SESSION not in os.environ
    assert gone(marked.pid)
    assert gone(holding.pid)
    assert other.poll() is None, "nothing else is touched"
    other.kill()
    other.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_guard_of_an_owner_that_is_killed_with_its_group_does_the_same(session: Path, number: int) -> None:
    code = (
        "import subprocess, sys, time; from cluster.guard import Guard; "
        f"Guard.of({str(session)!r}, grace_s=0.2); "
        f"print(subprocess.Popen({SLEEP!r}, start_new_session=True).pid, flush=True); time.sleep(300)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    child = int(owner.stdout.readline())
    os.killpg(owner.pid, number)
    owner.wait(timeout=20)
    assert gone(child)
    deadline = time.monotonic() + 20
    while session.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session.exists()
    assert members(str(session), {os.getpid()}) == []
