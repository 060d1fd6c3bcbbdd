"""What a format of rows is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.row import Row


@dataclass(frozen=True, slots=True)
class Format:
    """One format: its name in the configuration, how people call it, and the fields of a row that tell it."""

    name: str  # `RowFormat` of the configuration
    title: str  # "ShareGPT"
    fields: str  # those that tell it, for messages: "conversations"
    tells: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], bool], Row]
    """A row's fields and whether it must have an answer -> the row. Raises `RowProblem`."""
