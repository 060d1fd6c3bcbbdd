"""A process that cleans up after a Ray started here when its owner is gone: after SIGKILL there is nobody else.

    owner (holds the write end of a pipe)  ->  the kernel closes it when the owner ends  ->  guard reads the end
    guard: waits for Ray's processes to end by themselves, kills the others, removes their shared memory and the
           session's folder, ends

The guard's program needs nothing but Python's own library, so it starts in 20 ms and takes 10 MB.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from cluster.lifecycle import shared_memory

SESSION = "STILLHOUSE_SESSION"
"""In the environment of every process that belongs to the session: its folder."""

SEGMENTS = "shared-memory-"
"""Files in that folder: names in shared memory, a file for each process that has any."""

GRACE_S = 10.0  # for Ray's processes to notice that their driver is gone
KILL_S = 10.0
POLL_S = 0.1
RELEASE_TIMEOUT_S = 25.0  # longer than GRACE_S and KILL_S together


class Guard:
    """The owner's end. Starting one marks the environment of this process, and so of all that it starts from now on."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def of(cls, folder: str, *, grace_s: float = GRACE_S) -> Guard:
        """Watch over the session in `folder` from now on."""
        # Ray and vLLM write titles over their environment, by which their processes could not be found again.
        os.environ.update({SESSION: folder, "SPT_NOENV": "1"})
        home = str(Path(__file__).parents[2])
        program = f"import sys; sys.path.insert(0, {home!r}); from cluster.lifecycle import guard; "
        arguments = (folder, os.getpid(), grace_s)
        command = [sys.executable, "-I", "-S", "-c", f"{program}guard.main(*{arguments!r})"]
        # A session of its own: Ctrl-C and whatever else ends the owner's group does not end the guard.
        return cls(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True))

    def release(self) -> None:
        """Clean up now; bounded."""
        os.environ.pop(SESSION, None)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(RELEASE_TIMEOUT_S)


def remember(segments: Iterable[str]) -> None:
    """Called by a process of a session about the shared memory it has: when it is dead, nobody can ask it."""
    folder = os.environ.get(SESSION)
    if folder is not None and segments:
        Path(folder, f"{SEGMENTS}{os.getpid()}").write_text("\n".join(segments))


def remembered(folder: str) -> set[str]:
    """What the processes of the session in `folder` said."""
    return {line for file in Path(folder).glob(f"{SEGMENTS}*") for line in file.read_text().splitlines()}


def main(folder: str, owner: int, grace_s: float) -> None:
    """The guard's program."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    spared = {owner, os.getpid()}
    os.read(0, 1)  # its end: nothing is ever written
    segments = remembered(folder).union(*map(shared_memory.used_by, members(folder, spared)))
    grace = time.monotonic() + grace_s
    while members(folder, spared) and time.monotonic() < grace:
        time.sleep(POLL_S)
    patience = time.monotonic() + KILL_S
    while (left := members(folder, spared)) and time.monotonic() < patience:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    shared_memory.remove_unused(segments)
    shutil.rmtree(folder, ignore_errors=True)


def members(folder: str, spared: set[int]) -> list[int]:
    """Processes of the session: its mark in their environment, or one of its files open."""
    mark = f"{SESSION}={folder}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) not in spared:
            with contextlib.suppress(OSError):
                if _is_alive(name) and (mark in _environment(name) or _holds(name, folder)):
                    found.append(int(name))
    return found


def _is_alive(pid: str) -> bool:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] != b"Z"


def _environment(pid: str) -> list[bytes]:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read().split(b"\0")


def _holds(pid: str, folder: str) -> bool:
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith(folder + "/"):
                return True
    return False
