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

from cluster.lifecycle import shared_memory
from cluster.lifecycle.guard import SESSION, Guard, members, remember

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
        "import subprocess, sys, time; from cluster.lifecycle.guard import Guard; "
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
    while (session.exists() or members(str(session), {os.getpid()})) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session.exists()
    assert members(str(session), {os.getpid()}) == [], "the guard itself is gone, too"


SEGMENTS = """
import subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory
segments = [shared_memory.SharedMemory(name, create=True, size=4096) for name in sys.argv[1:]]
for segment in segments:
    resource_tracker.unregister(segment._name, "shared_memory")
print("there", flush=True)
time.sleep(300)
"""


SEMAPHORE = """
import multiprocessing, time
lock = multiprocessing.get_context("spawn").Lock()
print(lock._semlock.name, flush=True)
time.sleep(300)
"""


def test_a_semaphore_is_found_by_who_made_it(session: Path) -> None:
    maker = subprocess.Popen([sys.executable, "-c", SEMAPHORE], stdout=subprocess.PIPE, text=True)
    path = f"/dev/shm/sem.{maker.stdout.readline().strip().lstrip('/')}"
    assert shared_memory.used_by(maker.pid) == {path}
    assert shared_memory.remove_unused([path]) == {path}
    maker.kill()
    maker.wait()
    assert shared_memory.remove_unused([path, "/dev/shm/gone", "/etc/passwd"]) == set()
    assert not Path(path).exists()
    assert Path("/etc/passwd").exists()
    assert shared_memory.used_by(maker.pid) == set()


def test_shared_memory_of_killed_processes_goes_and_that_of_others_stays(session: Path) -> None:
    names = [f"sh-test-{os.getpid()}-{kind}" for kind in ("mine", "also", "other")]
    paths = [Path("/dev/shm") / name for name in names]
    other = subprocess.Popen([sys.executable, "-c", SEGMENTS, names[2]], stdout=subprocess.PIPE)
    other.stdout.readline()
    guard = Guard.of(str(session), grace_s=0.2)
    dead = f"/dev/shm/sh-test-{os.getpid()}-dead"
    Path(dead).touch()
    remember([dead])
    mine = subprocess.Popen([sys.executable, "-c", SEGMENTS, *names[:2]], stdout=subprocess.PIPE)
    mine.stdout.readline()
    held = paths[1].open("rb")  # used by somebody who is no member
    assert all(path.exists() for path in paths)
    os.environ.pop(SESSION)
    holder = subprocess.Popen(SLEEP, stdin=held)
    held.close()
    guard.release()
    mine.wait(timeout=20)
    there = [path.exists() for path in paths]
    for process in (holder, other):
        process.kill()
        process.wait()
    for path in paths:
        path.unlink(missing_ok=True)
    assert there == [False, True, True]
    assert not Path(dead).exists(), "of a process that nobody could ask any more"
