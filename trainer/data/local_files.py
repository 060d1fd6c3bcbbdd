"""Files of rows on this machine, by their paths and by patterns."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from configs.paths import expand_home, is_pattern, is_url
from trainer.errors import ConfigError, foreign_errors

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file of rows on this machine."""

    name: str  # for messages: as it was written, or found
    path: Path


def local_files(path: str) -> list[RowFile]:
    """The files that a path names here, if only through a pattern; none for a folder, a URL and a hub name.

    Raises `ConfigError` for a pattern that matches nothing.
    """
    if is_url(path):
        return []
    with foreign_errors(f"cannot look at the dataset {path!r}"):
        place = expand_home(path)
        is_file, exists = place.is_file(), place.exists()
    if is_file:
        return [RowFile(path, place)]
    return [] if exists or not is_pattern(path) else _matching(path, place)


def _matching(pattern: str, place: Path) -> list[RowFile]:
    """The files that a pattern matches, sorted by their paths."""
    found = sorted(glob.glob(str(place), recursive=True))
    files = [RowFile(name, Path(name)) for name in found if Path(name).is_file()]
    if files:
        return files
    if found:
        raise ConfigError(f"the pattern {pattern} matches only folders, such as {found[0]}: write {pattern}/*.jsonl")
    above = next(one for one in place.absolute().parents if not is_pattern(str(one)) or one.exists())
    names = sorted(one.name for one in above.iterdir() if not one.name.startswith(".")) if above.is_dir() else []
    there = f"{above} holds {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}" if names else ""
    there = there or (f"{above} is empty" if above.is_dir() else f"there is no folder {above}")
    raise ConfigError(f"the pattern {pattern} matches no file ({there})")
