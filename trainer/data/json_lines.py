"""JSON lines as rows: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from trainer.data.text_files import Record, decoded, lines_of, preview
from trainer.errors import BadRow

LINES = (".jsonl", ".ndjson")


class JsonLines:
    """Blank lines are no rows, and a UTF-8 byte order mark is skipped."""

    def records(self, file: BinaryIO, start: int = 0, number: int = 1) -> Iterator[Record]:
        return (line for line in lines_of(file, start, number) if line.content and not line.content.isspace())

    def decode(self, record: bytes, origin: str) -> Mapping[str, Any]:
        record = record.removesuffix(b"\n")
        text = decoded(record, origin)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            hint = _hint(text, error)
            raise BadRow(
                origin, f"not a JSON object: {error.msg} at column {error.colno}; {hint}", preview(record)
            ) from error
        except RecursionError as error:
            raise BadRow(origin, "not a row: JSON nested too deeply", preview(record)) from error
        except ValueError as error:
            raise BadRow(origin, f"not a JSON object: {error}", preview(record)) from error
        if not isinstance(value, dict):
            hint = '; write {"messages": [...]}' if isinstance(value, list) and "role" in text else ""
            what = f"must be a JSON object with named fields, not a {type(value).__name__}{hint}"
            raise BadRow(origin, what, preview(record))
        return value


def _hint(text: str, error: json.JSONDecodeError) -> str:
    if text.strip() == "{":
        return "one object stands on several lines: write each on a line of its own, or all in a list, [{...}, {...}]"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
        return "the line ends too early (was the file cut off?)"
    return "write one JSON object per line"
