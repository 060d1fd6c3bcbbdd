"""Rows of a dataset by number, in the format in which they are read (`trainer/data/formats/`).

With `auto` every row is read by its own fields (null is absent), after the configuration's `columns` have named them.
All rows must have the same format; one that has another is a bad row.

A row that fits several has the one that says most: several answers before a conversation, a conversation before a
question with its answer, and these before plain text, which is often one of the others written out. Two that say
equally much are an error: which is meant, the configuration must say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from configs.prompts import Dataset, RowFormat
from trainer.data.columns import Columns
from trainer.data.formats.format import Format
from trainer.data.formats.guess import columns_for
from trainer.data.formats.messages import MESSAGES, SHAREGPT
from trainer.data.formats.preference import CANDIDATES, PREFERENCE
from trainer.data.formats.prompt import PROMPT, PROMPT_COMPLETION, TEXT
from trainer.data.formats.single_turn import ALPACA, DOLLY, QUERY_RESPONSE, QUESTION_ANSWER
from trainer.data.formats.values import RowProblem
from trainer.data.order import Order, Permuted
from trainer.data.raw_rows import Chosen, RawRows
from trainer.data.row import CandidatesRow, PreferenceRow, Row, TextRow, preview
from trainer.data.row_fields import other_format, refuse_row_fields, row_weight
from trainer.data.row_files import open_raw_rows
from trainer.data.stream_files import stream_files
from trainer.data.streamed import StreamedRows, StreamOrder
from trainer.errors import BadRow, DataError

_BY_RANK = (
    (PREFERENCE, CANDIDATES),
    (MESSAGES, SHAREGPT),
    (PROMPT_COMPLETION, ALPACA, DOLLY, QUERY_RESPONSE, QUESTION_ANSWER),
    (TEXT,),
)
FORMATS: Mapping[str, Format] = {one.name: one for one in (PROMPT, *(one for rank in _BY_RANK for one in rank))}

_SEARCHED_ROWS = 10_000
_SHOWN_FIELDS = 12


@dataclass(frozen=True, slots=True)
class Rows:
    """A dataset of one format, read row by row."""

    raw: RawRows
    format: RowFormat
    columns: Columns
    told_by_fields: bool = False  # not named by the configuration: every row must show this format itself
    prompt_keys: np.ndarray | None = None  # uint64 [N]: of each row's prompt (prompt_keys.py), where they are known

    @classmethod
    def open(cls, dataset: Dataset) -> Rows:
        """Raises as `open_raw_rows` does, `DataError` where no row fits a format, and `WrongKey` where no row has a
        column that is mapped."""
        raw, columns = _raw_rows(dataset), Columns(dataset.columns)
        columns.check(_first_rows(raw), where=dataset.name)
        if dataset.format != "auto":
            return cls(raw, dataset.format, columns)
        return cls(raw, _first_format(raw, columns), columns, told_by_fields=True)

    def __len__(self) -> int:
        return len(self.raw)

    def only(self, chosen: np.ndarray, *, prompt_keys: np.ndarray | None = None) -> Rows:
        """Those of which `chosen`, bool [N], says so; each keeps its place in messages. `prompt_keys` are those of all
        rows."""
        keys = None if prompt_keys is None else prompt_keys[chosen]
        return replace(self, raw=Chosen(self.raw, np.flatnonzero(chosen)), prompt_keys=keys)

    def order(self, *, seed: int, shuffle: bool) -> Order:
        """Which row stands at which position of an epoch; a stream has an order of its own."""
        if isinstance(self.raw, StreamedRows):
            return StreamOrder(self.raw, seed=seed, shuffle=shuffle)
        return Permuted(self.raw.name, len(self.raw), seed=seed, shuffle=shuffle)

    @property
    def title(self) -> str:
        """What people call the format, and whether its rows are text that no chat template is put around."""
        title = FORMATS[self.format].title
        first = next(self._parsed(), None)
        is_text = isinstance(first.best if isinstance(first, PreferenceRow | CandidatesRow) else first, TextRow)
        return f"{title}, without the chat template" if is_text else title

    def _parsed(self) -> Iterator[Row]:
        """Those of the first rows that can be read."""
        for row in range(min(len(self), _SEARCHED_ROWS)):
            with suppress(BadRow):
                yield self.read(row, needs_answer=False)

    def read(self, row: int, *, needs_answer: bool) -> Row:
        """Raises `BadRow` naming place and field. Without `needs_answer` a missing answer is no mistake."""
        raw = self.raw.raw(row)
        try:
            value = self.columns.apply(raw)
            self._check_format(value)
            return _parse(value, FORMATS[self.format], needs_answer=needs_answer)
        except RowProblem as problem:
            raise BadRow(self.raw.origin(row), f"{problem}{self._hint(problem, raw)}", preview(raw)) from problem
        except RecursionError:
            raise BadRow(self.raw.origin(row), "not a row: nested too deeply") from None

    def _check_format(self, value: Mapping[str, Any]) -> None:
        """Raises `RowProblem` for a row of another format than the dataset's: read by that one it would be learnt as
        something else."""
        if not self.told_by_fields:
            return
        expected, found = FORMATS[self.format], _format_of(value, mapped=self.columns.names)
        if found is not None and found is not expected:
            raise RowProblem(
                f"{found.fields}: the row is of another format than the first one, which is read by its "
                f"{expected.fields}; give each format a dataset of its own, or name the one to read with format"
            )

    def _hint(self, problem: RowProblem, raw: Mapping[str, Any]) -> str:
        """What to write where a row lacks a field because it is of another format than the one named."""
        if self.told_by_fields or "is missing" not in str(problem):
            return ""
        try:
            found = _format_of(self.columns.apply(raw))
        except RowProblem:
            return ""
        if found is None:
            return other_format(raw)
        return f"; the fields are those of {found.title}: write format: {found.name}"


def _raw_rows(dataset: Dataset) -> RawRows:
    return StreamedRows(dataset.name, stream_files(dataset)) if dataset.streaming else open_raw_rows(dataset)


def _parse(value: Mapping[str, Any], row_format: Format, *, needs_answer: bool) -> Row:
    """A validated row, with its weight in the loss. Raises `RowProblem`."""
    refuse_row_fields(value, row_format=row_format.name)
    weight = row_weight(value, compared=row_format in (PREFERENCE, CANDIDATES))
    row = row_format.read(value, needs_answer)
    return row if weight == 1.0 else replace(row, weight=weight)


def _format_of(row: Mapping[str, Any], *, mapped: Collection[str] = ()) -> Format | None:
    """The format that a row has, by its own fields; where the configuration maps some, by what these can tell. None
    where no format fits. Raises `RowProblem` for a row that has two."""
    only = {name: row[name] for name in mapped if name in row}
    for fields in (only, row) if only else (row,):
        for rank in _BY_RANK:
            fitting = [one for one in rank if one.tells(fields)]
            if PROMPT_COMPLETION in fitting and row.get("completion") is not None:
                fitting = [PROMPT_COMPLETION]
            if len(fitting) > 1:
                raise RowProblem(_two(fitting))
            if fitting:
                return fitting[0]
    return None


def _two(fitting: list[Format]) -> str:
    first, second = fitting[:2]
    return (
        f"{first.fields}: the row has {second.fields} too, and may be read as {first.title} or as {second.title}; "
        f"write format: {first.name} or format: {second.name}"
    )


def _first_rows(raw: RawRows) -> Iterator[Mapping[str, Any]]:
    """Those of the first rows that can be decoded."""
    for row in range(min(len(raw), _SEARCHED_ROWS)):
        try:
            yield raw.raw(row)
        except BadRow:
            continue


def _first_format(raw: RawRows, columns: Columns) -> RowFormat:
    """The format of the first row that has one. Raises `DataError`, or `BadRow` where no row can be decoded."""
    decoded, undecoded = None, None
    for row in range(min(len(raw), _SEARCHED_ROWS)):
        try:
            value = columns.apply(raw.raw(row))
            found = _format_of(value, mapped=columns.names)
        except BadRow as problem:
            undecoded = undecoded or problem
            continue
        except RowProblem as problem:
            raise DataError(f"{raw.origin(row)}: {problem}") from problem
        if found is not None:
            return found.name
        decoded = decoded or (row, value)
    if decoded is None:
        assert undecoded is not None
        raise undecoded
    row, value = decoded
    more = "" if len(raw) <= _SEARCHED_ROWS else f", nor does any of the first {_SEARCHED_ROWS} rows"
    raise DataError(f"{raw.origin(row)}: {_no_format(value)}{more}")


def _no_format(value: Mapping[str, Any]) -> str:
    shown = ", ".join(ascii(field)[1:-1] for field in list(value)[:_SHOWN_FIELDS]) or "none"
    held = next((field for field in ("data", "rows", "examples", "train") if _holds_rows(value.get(field))), None)
    if held is not None:
        return f"is no row but holds {len(value[held])} in its field {held}: write that list alone, [{{...}}, {{...}}]"
    return (
        f"the fields fit no format; found: {shown}; needed: messages, or prompt and completion, or prompt, or text, or "
        f"those of another format in docs/data.md{other_format(value) or f'; {columns_for(value)}'}"
    )


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
