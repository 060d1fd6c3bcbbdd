"""Names in shared memory that dead processes leave behind: which ones a process has, and taking away what nobody uses.

vLLM's shards talk through named segments that live until somebody removes them, which a killed process does not, and on
hosts not even one that is told to end. Pure Python without packages: the guard of a session runs it without any.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

FOLDER = "/dev/shm"


def used_by(pid: int) -> set[str]:
    """Paths of the named segments of this user that a process has open or mapped; none for one that is gone."""
    with contextlib.suppress(OSError):
        return {path for path in _named(pid) if os.stat(path).st_uid == os.getuid()}
    return set()


def remove_unused(paths: Iterable[str]) -> set[str]:
    """Remove those of the paths that no process uses, and return the others that are still there."""
    there = {path for path in paths if path.startswith(FOLDER + "/") and os.path.exists(path)}
    used: set[str] = set()
    for name in os.listdir("/proc") if there else ():
        if name.isdecimal():
            with contextlib.suppress(OSError):
                used |= _named(int(name)) & there
    for path in there - used:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return used


def _named(pid: int) -> set[str]:
    """Without those whose name is gone already."""
    found = set()
    with open(f"/proc/{pid}/maps") as maps:
        found.update(line.split(maxsplit=5)[-1].rstrip("\n") for line in maps if FOLDER in line)
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return {path for path in found if path.startswith(FOLDER + "/") and os.path.exists(path)}
