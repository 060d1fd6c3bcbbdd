"""The configuration's `columns`: fields of a row under the names that are read here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.refusal import did_you_mean
from trainer.errors import WrongKey

_MISSING = object()
_SHOWN_FIELDS = 20
_DEPTH = 3  # of fields inside fields that a message lists


@dataclass(frozen=True, slots=True)
class Columns:
    """Our field: the name in the file, with dots for a field inside a field (a number for an item of a list)."""

    names: Mapping[str, str]

    def apply(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with each mapped field in place of what had its name, null where the row lacks it. Fields that are
        mapped to another name do not stay under their own."""
        if not self.names:
            return row
        rest = {name: value for name, value in row.items() if name not in self.names.values()}
        found = {ours: _value_at(row, theirs) for ours, theirs in self.names.items()}
        return rest | {ours: None if value is _MISSING else value for ours, value in found.items()}

    def check(self, rows: Iterable[Mapping[str, Any]], *, where: str) -> None:
        """Raises `WrongKey` for a name that none of these rows has."""
        left, seen = dict(self.names), dict[str, None]()
        for row in rows if left else ():
            left = {ours: theirs for ours, theirs in left.items() if _value_at(row, theirs) is _MISSING}
            if not left:
                return
            seen |= dict.fromkeys(_fields_of(row))
        for ours, theirs in left.items():
            raise WrongKey(
                f"columns.{ours}: no row of {where} has a field {theirs!r}{did_you_mean(theirs, seen)} (found: "
                f"{', '.join(list(seen)[:_SHOWN_FIELDS]) or 'none'})"
            )


def _value_at(row: Mapping[str, Any], name: str) -> Any:
    """The field of this name, or the one that its dots lead to."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value


def _fields_of(row: Mapping[str, Any], above: str = "", depth: int = _DEPTH) -> Iterator[str]:
    for name, value in row.items():
        path = f"{above}{name}"
        yield path if path.isprintable() else ascii(path)
        if isinstance(value, Mapping) and depth > 1:
            yield from _fields_of(value, f"{path}.", depth - 1)
