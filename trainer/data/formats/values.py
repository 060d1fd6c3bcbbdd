"""Single values of a row: text, JSON text, and what must not be in either."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class RowProblem(ValueError):
    """What is wrong with a row, field first; the caller adds file and line."""


def is_absent(value: Any) -> bool:
    """Whether a field says nothing: tables fill what only other rows have with null or emptiness."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def field_of(row: Mapping[str, Any], name: str, *, hint: str = "") -> Any:
    """The value of a field that a row must have, null allowed."""
    if name not in row:
        raise RowProblem(f"{name}: is missing{hint}")
    return row[name]


def text_of(place: str, value: Any, *, may_be_empty: bool = False) -> str:
    """The value, which must be text. Raises `RowProblem`."""
    if not isinstance(value, str):
        raise RowProblem(f"{place}: must be text, not {kind_of(value)}")
    if not may_be_empty and not value.strip():
        raise RowProblem(f"{place}: is empty")
    refuse_surrogates(place, value)
    return value


def json_of(place: str, value: Any, *, what: str) -> Any:
    """A value that may be written as JSON text, as in a column of a table. `what` it must be, for the message."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        hint = (
            "; save it with json.dumps, this is Python's notation" if value.lstrip().startswith(("[{'", "{'")) else ""
        )
        raise RowProblem(f"{place}: must be {what}, and this text is no JSON: {error}{hint}") from error
    except RecursionError:
        raise RowProblem(f"{place}: is nested too deeply") from None


def kind_of(value: Any) -> str:
    """`a string`, `null`: of what kind a value is, for messages."""
    return "null" if value is None else f"{_NAMES.get(type(value), f'a {type(value).__name__}')}"


_NAMES = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    list: "a list",
    dict: "an object",
}


def refuse_surrogates(place: str, value: Any) -> None:
    """JSON can hold lone surrogates, which neither tokenizers nor terminals accept."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            raise RowProblem(f"{place}: is not text: lone surrogate {code} at character {error.start}") from error
    elif isinstance(value, list):
        for index, item in enumerate(value):
            refuse_surrogates(f"{place}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            refuse_surrogates(f"the name of a field of {place}", key)
            refuse_surrogates(f"{place}.{key}", item)
