"""Rows by number, not yet validated, and two views of them: several sources as one, and some rows of one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol


class RawRows(Protocol):
    """Rows by number, not yet validated."""

    name: str

    def __len__(self) -> int: ...

    def origin(self, row: int) -> str:
        """Where the row lies, for messages: `file:line` or `dataset[row N]`."""
        ...

    def raw(self, row: int) -> Mapping[str, Any]:
        """Raises `BadRow` where the row cannot even be decoded."""
        ...


class Joined:
    """The rows of several sources, one source after the other."""

    def __init__(self, name: str, sources: Sequence[RawRows]) -> None:
        self.name = name
        self._sources = sources
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def origin(self, row: int) -> str:
        source, its_row = self._find(row)
        return source.origin(its_row)

    def raw(self, row: int) -> Mapping[str, Any]:
        source, its_row = self._find(row)
        return source.raw(its_row)

    def _find(self, row: int) -> tuple[RawRows, int]:
        number = bisect_right(self._ends, row)
        return self._sources[number], row - (self._ends[number - 1] if number else 0)


class Chosen:
    """Rows of a source by their numbers there; each keeps its place in messages."""

    def __init__(self, source: RawRows, rows: Sequence[int]) -> None:
        self.name = source.name
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def origin(self, row: int) -> str:
        return self._source.origin(int(self._rows[row]))

    def raw(self, row: int) -> Mapping[str, Any]:
        return self._source.raw(int(self._rows[row]))


def joined(name: str, sources: Sequence[RawRows]) -> RawRows:
    """The only source itself, or all as one."""
    return sources[0] if len(sources) == 1 else Joined(name, sources)
