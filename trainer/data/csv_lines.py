"""CSV and TSV as rows: the first line names the columns, and every cell is text.

As RFC 4180 says: a cell that holds the separator, a quote or a line break stands in double quotes, and a quote inside
it is doubled. Cells are taken as they are written, so that an answer such as `NA`, `007` or ` 1` stays that; an empty
cell is a field that the row does not have, and a column without a name is left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.text_files import MAX_RECORD_BYTES, Record, decoded, lines_of, preview
from trainer.errors import BadRow, DataError, foreign_errors

SEPARATORS = {".csv": ",", ".tsv": "\t"}
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons"}
_KINDS = {",": "CSV", "\t": "TSV"}
_UNCLOSED, _TOO_LONG = "unexpected end of data", "field larger than field limit"  # messages of the csv module


class CsvLines:
    """The rows below the header."""

    def __init__(self, columns: tuple[str, ...], separator: str, name: str) -> None:
        self._columns = columns
        self._separator = separator
        self._name = name

    @classmethod
    def of(cls, file: BinaryIO, *, name: str, separator: str) -> CsvLines:
        """Reads the header of a file that stands at its beginning. Raises `DataError` for one that names no columns."""
        first = next(_records(file, 0, 1, separator, name), None)
        if first is None:
            raise DataError(f"the dataset {name} has no rows: the file is empty")
        origin = f"{name}:{first.number}"
        columns = [column.strip() for column in _cells(first.content, separator, origin)]
        named = [column for column in columns if column]
        twice = next((column for column in named if named.count(column) > 1), None)
        if twice is not None:
            raise DataError(f"{origin}: the header names the column {twice!r} twice: rename one of them")
        if len(columns) == 1:
            other = next((mark for mark in _NAMES if mark != separator and mark in columns[0]), None)
            if other is not None:
                write = {"\t": ", or call the file .tsv", ",": ", or call the file .csv"}.get(other, "")
                raise DataError(
                    f"{origin}: the header is one column, {columns[0][:80]!r}, and seems to be separated by "
                    f"{_NAMES[other]}: save the file with {_NAMES[separator]}{write}"
                )
        return cls(tuple(columns), separator, name)

    def records(self, file: BinaryIO, start: int = 0, number: int = 1) -> Iterator[Record]:
        found = _records(file, start, number, self._separator, self._name)
        if start == 0:
            next(found, None)  # the header
        return found

    def decode(self, record: bytes, origin: str) -> Mapping[str, Any]:
        cells = _cells(record, self._separator, origin)
        if len(cells) != len(self._columns):
            shown = ", ".join(self._columns[:8]) + (", ..." if len(self._columns) > 8 else "")
            raise BadRow(
                origin,
                f"has {len(cells)} cell{'s' if len(cells) != 1 else ''}, and the header has {len(self._columns)} "
                f"({shown}); put a cell that holds {_NAMES[self._separator]} or line breaks in double quotes",
                preview(record),
            )
        return {column: cell for column, cell in zip(self._columns, cells, strict=True) if column and cell}


def open_csv(path: Path, *, name: str, separator: str) -> CsvLines:
    """The header of a file, as `CsvLines.of`."""
    with foreign_errors(f"cannot read the dataset {name}", error=DataError), path.open("rb") as file:
        return CsvLines.of(file, name=name, separator=separator)


def _records(file: BinaryIO, start: int, number: int, separator: str, name: str) -> Iterator[Record]:
    """Lines joined where a quoted cell goes over several; a line that is no CSV is a record of its own, which `decode`
    refuses. The header is the first one of a file."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    taken: list[Record] = []

    def texts() -> Iterator[str]:
        for line in lines_of(file, start, number):
            taken.append(line)
            yield line.content.decode("latin-1")  # borders are ASCII; `decode` reads the text

    reader = csv.reader(texts(), delimiter=separator, strict=True)
    while True:
        taken.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if str(error) == _UNCLOSED or str(error).startswith(_TOO_LONG):
                raise DataError(f"{name}:{taken[0].number}: {_runaway(str(error))}") from None
            cells = [""]
        if cells is None:
            return
        if cells:
            whole = b"".join(line.content for line in taken)
            yield Record(taken[0].start, taken[-1].end - taken[0].start, taken[0].number, whole)


def _runaway(problem: str) -> str:
    what = "none closes it until the end of the file"
    if problem != _UNCLOSED:
        what = f"it has more than {MAX_RECORD_BYTES // 2**20} MB (is it never closed?)"
    return (
        f"a cell begins in this line, and {what}: close its double quote; where a quote is text, double it and put the "
        "whole cell in quotes"
    )


def _cells(record: bytes, separator: str, origin: str) -> list[str]:
    """Raises `BadRow`."""
    text = decoded(record, origin)
    try:
        return next(csv.reader(io.StringIO(text, newline="\n"), delimiter=separator, strict=True))
    except csv.Error as error:
        reason = str(error)
        if "expected after" in reason:
            reason = (
                "text follows the closing double quote of a cell; where a quote is text, double it and put the whole "
                "cell in quotes"
            )
        elif "new-line character" in reason:
            reason = "holds a lone carriage return: save the file with line breaks of Unix or Windows"
        raise BadRow(origin, f"not {_KINDS[separator]}: {reason}", preview(record)) from error
