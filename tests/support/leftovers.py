"""What a run leaves on a machine when it ends, however it ends: processes, temporary folders, shared memory.

Everything that a run starts inherits a mark in its environment, by which it is found even when its parent is gone.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

MARK = "STILLHOUSE_TEST_MARK"
SHARED_MEMORY = Path("/dev/shm")
GONE_WITHIN_S = 120.0
"""For what has no parent any more and notices that by itself, on a machine that is busy."""

Found = TypeVar("Found")


def once_gone(look: Callable[[], list[Found]], timeout_s: float) -> list[Found]:
    """What `look` still finds after at most `timeout_s`; nothing, as soon as it finds nothing."""
    deadline = time.monotonic() + timeout_s
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


class Leftovers:
    """Looks for what carries this mark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self._shared: set[Path] = set()

    @property
    def environment(self) -> dict[str, str]:
        """For whatever is started. Ray's workers write their title over their environment unless told not to."""
        return {MARK: self.mark, "SPT_NOENV": "1", "TMPDIR": str(self.folder)}

    def processes(self) -> list[str]:
        """Those that carry the mark and are alive: pid and command line. Remembers the shared memory that they have."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                marked = self.mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
                    self._shared |= _shared_memory_of(process.pid)
        return found

    def folders(self) -> list[str]:
        """What lies in the folder that the marked processes take for /tmp."""
        return sorted(path.name for path in self.folder.iterdir())

    def shared_memory(self) -> list[str]:
        """Of what `processes` saw in use, the files that are still there."""
        return sorted(path.name for path in self._shared if path.exists())

    def after(self, timeout_s: float = GONE_WITHIN_S) -> list[str]:
        """What is left after at most `timeout_s`; nothing, as soon as there is nothing."""
        return once_gone(lambda: [*self.processes(), *self.folders(), *self.shared_memory()], timeout_s)


def _shared_memory_of(pid: int) -> set[Path]:
    """Files in shared memory that a process has open or mapped, under whatever name."""
    by_inode = {path.stat().st_ino: path for path in SHARED_MEMORY.iterdir()}
    process = Path(f"/proc/{pid}")
    inodes = {link.stat().st_ino for link in (process / "fd").iterdir() if os.readlink(link).startswith("/dev/shm/")}
    lines = [line.split() for line in (process / "maps").read_text().splitlines()]
    inodes |= {int(line[4]) for line in lines if len(line) > 5 and line[5].startswith("/dev/shm/")}
    return {by_inode[inode] for inode in inodes if inode in by_inode}


@contextlib.contextmanager
def leftovers() -> Iterator[Leftovers]:
    """With this process's environment marked, and a short folder of its own for temporary files."""
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as name, pytest.MonkeyPatch.context() as patch:
        found = Leftovers(Path(name))
        for key, value in found.environment.items():
            patch.setenv(key, value)
        yield found
