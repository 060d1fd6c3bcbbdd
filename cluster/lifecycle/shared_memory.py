"""Names in shared memory that dead processes leave behind: which ones a process has, and taking away what nobody uses.

vLLM's shards talk through named segments that live until somebody removes them, which a killed process does not, and on
hosts not even one that is told to end. Pure Python without packages: the guard of a session runs it without any.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

FOLDER = "/dev/shm"


def used_by(pid: int) -> set[str]:
    """Paths of the named segments of this user that a process has open or mapped; none for one that is gone."""
    with contextlib.suppress(OSError):
        return _used(pid, _segments())
    return set()


def remove_unused(paths: Iterable[str]) -> set[str]:
    """Remove those of the paths that no process uses, and return the others that are still there."""
    wanted = set(paths)
    segments = {key: path for key, path in _segments().items() if path in wanted}
    used: set[str] = set()
    for name in os.listdir("/proc") if segments else ():
        if name.isdecimal():
            with contextlib.suppress(OSError):
                used |= _used(int(name), segments)
    for path in set(segments.values()) - used:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return used


def _segments() -> dict[tuple[int, int], str]:
    """(device, inode) -> path, of this user's."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(FOLDER):
            with contextlib.suppress(OSError):
                status = os.stat(f"{FOLDER}/{name}")
                if status.st_uid == os.getuid():
                    found[status.st_dev, status.st_ino] = f"{FOLDER}/{name}"
    return found


def _used(pid: int, segments: Mapping[tuple[int, int], str]) -> set[str]:
    """By inode: whoever makes a semaphore has it mapped under another name, which is gone."""
    found = set()
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if FOLDER in line:
                major, minor = line.split()[3].split(":")
                found.add((os.makedev(int(major, 16), int(minor, 16)), int(line.split()[4])))
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            status = os.stat(f"/proc/{pid}/fd/{descriptor}")
            found.add((status.st_dev, status.st_ino))
    return {segments[key] for key in found if key in segments}
