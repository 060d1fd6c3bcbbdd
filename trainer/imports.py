"""Imports of large libraries: without what nobody needs of them, and without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def absent(*names: str) -> Iterator[None]:
    """Inside, these modules cannot be imported, as if they were not installed; what was imported before stays."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """For imports of torch and what builds on it. They make a million objects that stay for good, through all of which
    the cyclic garbage collector looks again and again: a third of the time of such an import. What is there at the end
    it never looks at any more."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
