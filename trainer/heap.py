"""The process's own heap: memory that was freed and is still held."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return free pages of the heap to the kernel, those between pages in use included.

    A heap that never shrinks by itself (`cluster.runtime` says which and why) keeps what a load took on its way for
    good. Does nothing where the C library has no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
