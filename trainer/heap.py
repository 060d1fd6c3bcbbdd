"""The process's own heap: memory that was freed and is still held."""

from __future__ import annotations

import ctypes
import os
import time

TRIM_EVERY_S = 10.0


def give_back() -> None:
    """Return free pages of the heap to the kernel, those between pages in use included.

    A heap that never shrinks by itself (`cluster.runtime` says which and why) keeps what a load took on its way for
    good. Does nothing where the C library has no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Trimmer:
    """Gives free pages back now and then, in a process whose heap never shrinks by itself; elsewhere does nothing.

    Text of ever other lengths leaves holes that the next one does not fit: an engine of the demo grew by 0.5 GB in six
    minutes. To clear the pages that are taken again costs less than 1 % of its time at this pace.
    """

    def __init__(self, *, every_s: float = TRIM_EVERY_S) -> None:
        self._every_s = every_s if os.environ.get("MALLOC_TRIM_THRESHOLD_") == "-1" else float("inf")
        self._next_s = time.monotonic() + self._every_s

    def look(self) -> None:
        """To be called between two pieces of work."""
        if (now := time.monotonic()) >= self._next_s:
            give_back()
            self._next_s = now + self._every_s
