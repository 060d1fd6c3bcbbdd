"""CPU time of processes and of whole trees of them, read from outside: what every benchmark counts with."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Seconds on a core."""

    user_s: float = 0.0
    system_s: float = 0.0

    def __add__(self, other: CpuTime) -> CpuTime:
        return CpuTime(self.user_s + other.user_s, self.system_s + other.system_s)

    def __sub__(self, other: CpuTime) -> CpuTime:
        return CpuTime(self.user_s - other.user_s, self.system_s - other.system_s)

    @property
    def total_s(self) -> float:
        return self.user_s + self.system_s


def of_this_process() -> CpuTime:
    """All threads of the caller, ended ones included; children are not."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return CpuTime(used.ru_utime, used.ru_stime)


def of_trees(roots: Iterable[int], *, without: Iterable[int] = ()) -> CpuTime:
    """These processes and all that descends from them, ended descendants included, but not the trees of `without`."""
    left_out = {process.pid for process in _family(without)}
    return sum((_of(process) for process in _family(roots) if process.pid not in left_out), CpuTime())


def _family(roots: Iterable[int]) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for pid in roots:
        try:
            root = psutil.Process(pid)
            found.update((process.pid, process) for process in (root, *root.children(recursive=True)))
        except psutil.NoSuchProcess:
            continue  # whatever it used is counted by the parent that waited for it
    return list(found.values())


def _of(process: psutil.Process) -> CpuTime:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return CpuTime()
    return CpuTime(times.user + times.children_user, times.system + times.children_system)
