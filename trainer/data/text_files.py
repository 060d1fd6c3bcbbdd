"""A text file as rows by number, through an index of the places of its records.

What a record is, a line of JSON or a line of CSV, says a `TextFormat`. `datasets` reads both too, but validates neither
and forgets the numbers of lines: a broken line would be an unnamed error of the whole file, and a wrong number of cells
or a missing field a row with nulls.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from trainer.errors import BadRow, DataError, foreign_errors

MAX_RECORD_BYTES = 16 * 2**20
"""A row is one conversation; a longer record is a file in the wrong format, and would stall the run that reads it."""

BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file, undecoded."""

    start: int  # byte of the file
    length: int  # in bytes
    number: int  # of the line where it begins, from 1
    content: bytes  # what is too long is cut

    @property
    def end(self) -> int:
        return self.start + self.length


class TextFormat(Protocol):
    """How a text file is cut into records, and how one is read."""

    def records(self, file: BinaryIO, start: int = 0, number: int = 1) -> Iterator[Record]:
        """From a border of records on, where `file` stands: byte `start`, which begins line `number`. Records that hold
        nothing are left out. Raises `DataError` where no further border can be told."""
        ...

    def decode(self, record: bytes, origin: str) -> Mapping[str, Any]:
        """Raises `BadRow`."""
        ...


class TextFile:
    """Rows of a text file. Opening it scans it once (16 bytes of memory a row); rows are read when asked for."""

    def __init__(self, path: Path, layout: TextFormat, *, name: str, max_rows: int | None = None) -> None:
        self.name = name
        self._layout = layout
        self._starts, self._lengths, self._numbers = array("q"), array("I"), array("I")
        with foreign_errors(f"cannot read the dataset {name}", error=DataError):
            self._file = path.open("rb")
            if max_rows is None or max_rows > 0:
                self._index(max_rows)

    def __len__(self) -> int:
        return len(self._starts)

    def origin(self, row: int) -> str:
        return f"{self.name}:{self._numbers[row]}"

    def raw(self, row: int) -> Mapping[str, Any]:
        origin, length = self.origin(row), self._lengths[row]
        check_length(length, origin)
        record = os.pread(self._file.fileno(), length, self._starts[row])
        return self._layout.decode(record, origin)

    def _index(self, max_rows: int | None) -> None:
        for record in self._layout.records(self._file):
            self._starts.append(record.start)
            self._lengths.append(min(record.length, 2**32 - 1))
            self._numbers.append(record.number)
            if len(self) == max_rows:
                return


def lines_of(file: BinaryIO, start: int, number: int) -> Iterator[Record]:
    """All lines, blank ones too, each with its line break and the first without a byte order mark."""
    while piece := file.readline(MAX_RECORD_BYTES + 1):
        content, length = piece, len(piece)
        while not piece.endswith(b"\n") and (piece := file.readline(MAX_RECORD_BYTES + 1)):
            length += len(piece)
        mark = len(BOM) if start == 0 and content.startswith(BOM) else 0
        yield Record(start + mark, length - mark, number, content[mark:])
        start, number = start + length, number + 1


def check_text(beginning: bytes, name: str) -> None:
    """Raises `DataError` for a file whose first bytes say that it is UTF-16."""
    if beginning.startswith(_UTF16):
        raise DataError(f"{name} is UTF-16 text: save it as UTF-8")


def check_length(length: int, origin: str) -> None:
    """Raises `BadRow` for a record that is too long for a row."""
    if length > MAX_RECORD_BYTES:
        text = f"the line has {length / 2**20:.0f} MB, the limit is {MAX_RECORD_BYTES // 2**20} MB: "
        raise BadRow(origin, text + "write one row, which is one conversation, on each line")


def decoded(record: bytes, origin: str) -> str:
    """Raises `BadRow` for what is not UTF-8."""
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            origin,
            f"not UTF-8: byte 0x{record[error.start]:02X} at byte {error.start + 1} of the line; "
            "save the file as UTF-8 (is it Latin-1?)",
            preview(record),
        ) from error


def preview(record: bytes) -> str:
    """The beginning, for messages."""
    return record[:200].decode("utf-8", errors="replace")
