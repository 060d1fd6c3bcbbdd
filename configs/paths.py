"""Paths that a user names: `~`, and names that other libraries take for patterns."""

from __future__ import annotations

import os
from pathlib import Path

from configs.errors import ConfigError

PATTERN_CHARACTERS = "*?["


def expand_home(path: str | Path) -> Path:
    """A path with `~` and `~user` replaced. Raises `ValueError` for a user whom the machine does not know."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and str(path).startswith("~") and not Path(expanded).exists():
        raise ValueError(f"{path}: there is no user {expanded.split('/')[0][1:]!r} here; write the path out")
    return Path(expanded)


def refuse_pattern(place: str, path: Path, *, reader: str) -> None:
    """Raises `ConfigError` for a folder whose absolute name would be read as a pattern, and so as another folder."""
    absolute = str(path.absolute())
    if any(character in absolute for character in PATTERN_CHARACTERS):
        raise ConfigError(
            f"{place}: {absolute} contains one of {' '.join(PATTERN_CHARACTERS)}, and {reader} reads such a name as a "
            "pattern of other names; rename the folder"
        )
