"""Rows of a dataset by number, and the format in which they are read (`trainer/data/read_row.py`).

With `auto` every row is read by its own fields: the first of messages, prompt and text that it has (null is absent). A
prompt is answered where the row has a completion, and twice where it has chosen and rejected. All rows must have the
same format; one that has another is a bad row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.prompts import Dataset
from trainer.data.raw_rows import RawRows
from trainer.data.read_row import parse_row
from trainer.data.row import Row, RowFormat, preview
from trainer.data.row_fields import RowProblem, other_format
from trainer.data.row_files import open_raw_rows
from trainer.errors import BadRow, DataError

_AUTO: Mapping[str, RowFormat] = {"messages": "messages", "prompt": "prompt_completion", "text": "text"}
"""The field that tells a row's format, in the order in which `auto` looks: a row with messages and a prompt is read by
its messages."""

_SEARCHED_ROWS = 10_000
_SHOWN_FIELDS = 12


@dataclass(frozen=True, slots=True)
class Rows:
    """A dataset of one format, read row by row."""

    raw: RawRows
    format: RowFormat
    told_by_fields: bool = False  # not named by the configuration: every row must show this format itself

    @classmethod
    def open(cls, dataset: Dataset) -> Rows:
        """Raises as `open_raw_rows` does, and `DataError` where no row fits a format."""
        raw = open_raw_rows(dataset)
        if dataset.format != "auto":
            return cls(raw=raw, format=dataset.format)
        return cls(raw=raw, format=_first_format(raw), told_by_fields=True)

    def __len__(self) -> int:
        return len(self.raw)

    def read(self, row: int, *, needs_answer: bool) -> Row:
        """Raises `BadRow` naming place and field. Without `needs_answer` a missing answer is no mistake."""
        value = self.raw.raw(row)
        try:
            if self.told_by_fields:
                _check_own_format(value, self.format)
            return parse_row(value, row_format=self.format, needs_answer=needs_answer)
        except RowProblem as problem:
            raise BadRow(self.raw.origin(row), str(problem), preview(value)) from problem
        except RecursionError:
            raise BadRow(self.raw.origin(row), "not a row: nested too deeply") from None


def _first_format(raw: RawRows) -> RowFormat:
    """The format of the first row that has one. Raises `DataError`, or `BadRow` where no row can be decoded."""
    decoded, undecoded = None, None
    for row in range(min(len(raw), _SEARCHED_ROWS)):
        try:
            value = raw.raw(row)
        except BadRow as problem:
            undecoded = undecoded or problem
            continue
        found = _own_format(value)
        if found is not None:
            return found
        decoded = decoded or (row, value)
    if decoded is None:
        assert undecoded is not None
        raise undecoded
    row, value = decoded
    more = "" if len(raw) <= _SEARCHED_ROWS else f", nor does any of the first {_SEARCHED_ROWS} rows"
    raise DataError(f"{raw.origin(row)}: {_no_format(value)}{more}")


def _own_format(value: Mapping[str, Any]) -> RowFormat | None:
    found = next((row_format for field, row_format in _AUTO.items() if value.get(field) is not None), None)
    pair = found == "prompt_completion" and value.get("chosen") is not None and value.get("rejected") is not None
    return "preference" if pair else found


def _no_format(value: Mapping[str, Any]) -> str:
    shown = ", ".join(ascii(field)[1:-1] for field in list(value)[:_SHOWN_FIELDS]) or "none"
    return (
        f"the fields fit no format; found: {shown}; needed: messages, or prompt and completion, or prompt, or text"
        f"{other_format(value)}"
    )


def _check_own_format(value: Mapping[str, Any], expected: RowFormat) -> None:
    """Raises `RowProblem` for a row of another format than the dataset's: read by that one it would be learnt as
    something else."""
    found = _own_format(value)
    if found is None or found == expected:
        return
    fields = {row_format: field for field, row_format in _AUTO.items()} | {"preference": "chosen and rejected"}
    raise RowProblem(
        f"{fields[found]}: the row is of another format than the first one, which is read by its {fields[expected]}; "
        "give each format a dataset of its own, or name the one to read with format"
    )
