"""Rows that cannot be used, told by reason: what is wrong with a thousand rows is one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.data.prompts import RowReport
from trainer.errors import BadRow

SHOWN_REASONS = 10
SHOWN_PLACES = 3


def bad_rows(place: str, report: RowReport) -> str:
    """`place`: of the rows in the configuration. Also for a dataset of which no row is left."""
    if not report.bad_rows:
        dropped = f"{report.num_dropped} of {report.num_checked} are too long; raise data.max_length"
        return f"{place}: no row is left: {dropped}"
    groups = by_reason(report.bad_rows)
    lines = [f"{place}: {len(report.bad_rows)} of {report.num_checked} rows cannot be used"]
    lines += [f"    {_told(group)}" for group in groups[:SHOWN_REASONS]]
    rest = groups[SHOWN_REASONS:]
    if rest:
        lines.append(f"    and {sum(map(len, rest))} more, for {len(rest)} other reason{'s' if len(rest) > 1 else ''}")
    return "\n".join(lines)


def by_reason(rows: Sequence[BadRow]) -> list[list[BadRow]]:
    """Those whose reasons differ in numbers alone are one group; in the order of their first rows."""
    groups: dict[str, list[BadRow]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"\d+", "0", row.reason), []).append(row)
    return list(groups.values())


def _told(group: Sequence[BadRow]) -> str:
    """The first as it says itself, and where the others are."""
    first, others = group[0], group[1:]
    if not others:
        return str(first)
    places = ", ".join(row.origin for row in others[:SHOWN_PLACES]) + (", ..." if len(others) > SHOWN_PLACES else "")
    alike = "" if all(row.reason == first.reason for row in others) else " with other numbers"
    return f"{first} ({len(others)} more{alike}: {places})"
