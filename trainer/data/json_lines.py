"""A jsonl file as rows by number.

`datasets` does not validate json lines and forgets their numbers (a broken line surfaces as an unnamed generation
error, a missing field as null), so they are read here, through an index of line offsets.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import BadRow, DataError, foreign_errors

MAX_LINE_BYTES = 16 * 2**20
"""A row is one conversation; a longer line is a file in the wrong format, and would stall the run that reads it."""

BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class JsonLines:
    """A jsonl file. Opening it scans it once for line borders (16 bytes of memory a row); rows are read when asked for.

    Blank lines are no rows and a UTF-8 byte order mark is skipped.
    """

    def __init__(self, path: Path, max_rows: int | None = None) -> None:
        self.name = str(path)
        self._starts, self._lengths, self._numbers = array("q"), array("I"), array("I")
        with foreign_errors(f"cannot read the dataset {path}", error=DataError):
            self._file = path.open("rb")
            start = self._file.read(2)
            self._index(max_rows)
        if start in _UTF16:
            raise DataError(f"{path} is UTF-16 text: save it as UTF-8")

    def __len__(self) -> int:
        return len(self._starts)

    def origin(self, row: int) -> str:
        return f"{self.name}:{self._numbers[row]}"

    def raw(self, row: int) -> Mapping[str, Any]:
        origin, length = self.origin(row), self._lengths[row]
        if length > MAX_LINE_BYTES:
            raise BadRow(
                origin,
                f"the line has {length / 2**20:.0f} MB, the limit is {MAX_LINE_BYTES // 2**20} MB: "
                "write one row as one JSON object per line",
            )
        line = os.pread(self._file.fileno(), length, self._starts[row]).removesuffix(b"\n")
        return _decode_line(line.removeprefix(BOM) if self._numbers[row] == 1 else line, origin)

    def _index(self, max_rows: int | None) -> None:
        self._file.seek(0)
        offset, number = 0, 0
        while (max_rows is None or len(self) < max_rows) and (piece := self._file.readline(MAX_LINE_BYTES + 1)):
            line = piece.removeprefix(BOM) if number == 0 else piece
            start, length = offset, len(piece)
            while not piece.endswith(b"\n") and (piece := self._file.readline(MAX_LINE_BYTES + 1)):
                length += len(piece)
            offset, number = start + length, number + 1
            if line and not line.isspace():
                self._starts.append(start)
                self._lengths.append(min(length, 2**32 - 1))
                self._numbers.append(number)


def _decode_line(line: bytes, origin: str) -> Mapping[str, Any]:
    preview = line[:200].decode("utf-8", errors="replace")
    try:
        text = line.decode("utf-8")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise BadRow(
            origin,
            f"not UTF-8: byte 0x{line[error.start]:02X} at byte {error.start + 1} of the line; "
            "save the file as UTF-8 (is it Latin-1?)",
            preview,
        ) from error
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        raise BadRow(
            origin,
            f"not a JSON object: {error.msg} at column {error.colno}"
            + ("; the line ends too early (was the file cut off?)" if cut else "; write one JSON object per line"),
            preview,
        ) from error
    except RecursionError as error:
        raise BadRow(origin, "not a row: JSON nested too deeply", preview) from error
    except ValueError as error:
        raise BadRow(origin, f"not a JSON object: {error}", preview) from error
    if not isinstance(value, dict):
        raise BadRow(origin, f"must be a JSON object with named fields, not a {type(value).__name__}", preview)
    return value
