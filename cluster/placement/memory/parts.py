"""What memory is added up of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MARGIN = 0.25
"""By which an estimate may be off, either way (docs/memory.md has what was measured)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One use of memory in one process or on one device."""

    name: str
    num_bytes: int
    certain: bool = False  # follows from counts and dtypes alone: a process that lacks this cannot run


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """What each process of a role needs at its peak. Without an accelerator all of it is in `host`."""

    role: str
    processes: int  # that have as much each; of an engine split over devices, one for each
    device: tuple[Part, ...] = ()
    host: tuple[Part, ...] = ()
    shared: tuple[Part, ...] = ()  # of host memory: once on a machine, however many of the processes it has
    share: float = 1.0  # of a device's memory that the role may take
    place: str = ""  # in the configuration

    @property
    def device_bytes(self) -> int:
        return total(self.device)

    @property
    def host_bytes(self) -> int:
        """Of each process, without what is shared."""
        return total(self.host)


def total(parts: Iterable[Part]) -> int:
    return sum(part.num_bytes for part in parts)


def certain(parts: Iterable[Part]) -> int:
    return sum(part.num_bytes for part in parts if part.certain)
