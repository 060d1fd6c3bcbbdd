"""Did you mean: the nearest allowed word. One function, because every message that refuses a word should offer one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or an empty string where nothing is near."""
    nearest = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
