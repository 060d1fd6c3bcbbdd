"""The terminal of a run, and what is left of it when somebody closes it."""

from __future__ import annotations

import os

_TERMINALS = tuple(number for number in (1, 2) if os.isatty(number))


def leave_dead_terminal() -> None:
    """Whatever is said on a terminal that is gone raises OSError; from here on it is said to nobody."""
    dead = [number for number in _TERMINALS if not os.isatty(number)]
    if not dead:
        return
    nobody = os.open(os.devnull, os.O_WRONLY)
    for number in dead:
        os.dup2(nobody, number)
    os.close(nobody)
