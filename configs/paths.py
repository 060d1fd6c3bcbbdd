"""Paths that a user gives: expansion of `~`, and names that other libraries would read as patterns."""

from __future__ import annotations

import os
import re
from pathlib import Path

from configs.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
"""The folder of the four packages."""

PATTERN_CHARACTERS = "*?["
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes: more, and no file system of Linux has it."""


def is_url(path: str) -> bool:
    """`s3://bucket/rows.jsonl` and the like, whether the protocol exists or not."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def is_pattern(path: str) -> bool:
    """Whether a path that does not exist as it is written names several: `data/*.jsonl`."""
    return any(character in path for character in PATTERN_CHARACTERS)


def expand_home(path: str | Path) -> Path:
    """A path with `~` and `~user` replaced. Raises `ValueError` for an unknown user, and for a name that no file
    system accepts."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and str(path).startswith("~") and not Path(expanded).exists():
        raise ValueError(f"{path}: there is no user {expanded.split('/')[0][1:]!r} here; write the path out")
    name = max(os.fsencode(expanded).split(b"/"), key=len)
    if len(name) > LONGEST_NAME or len(os.fsencode(expanded)) > LONGEST_PATH:
        shown = f"{expanded[:40]}...{expanded[-10:]}"
        raise ValueError(f"{shown}: too long; a name has at most {LONGEST_NAME} bytes and a path {LONGEST_PATH}")
    if "\0" in expanded:
        raise ValueError(f"{expanded!r}: a path holds no NUL character")
    return Path(expanded)


def with_known_home(path: str) -> str:
    """The path as it is, `~` included: whoever opens it expands it. Raises `ValueError` where that would fail."""
    expand_home(path)
    return path


def named_path(place: str, path: str | Path) -> Path:
    """`expand_home` for a path that comes from a command line or an environment variable, `place`. Raises
    `ConfigError`."""
    try:
        return expand_home(path)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def refuse_pattern(place: str, path: Path, *, reader: str) -> None:
    """Raises `ConfigError` for a folder whose absolute name would be read as a pattern, and so as another folder."""
    absolute = str(path.absolute())
    if any(character in absolute for character in PATTERN_CHARACTERS):
        raise ConfigError(
            f"{place}: {absolute} contains one of {' '.join(PATTERN_CHARACTERS)}, and {reader} reads such a name as a "
            "pattern of other names; rename the folder"
        )
