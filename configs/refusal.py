"""Errors of validation rules, at the place of the wrong value, and suggestions of the nearest allowed word.

Shared by the schema, the plug-ins and the reader of files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


def refusal(place: tuple[str | int, ...], value: Any, text: str) -> ValidationError:
    """An error to raise inside a validator; `place` is relative to the model that validates."""
    return refusals([(place, value, text)])


def refusals(problems: Iterable[tuple[tuple[str | int, ...], Any, str]]) -> ValidationError:
    """As `refusal`, for several at once."""
    details: list[InitErrorDetails] = [
        InitErrorDetails(type=PydanticCustomError("rule", "{text}", {"text": text}), loc=place, input=value)
        for place, value, text in problems
    ]
    return ValidationError.from_exception_data("rule", details)


def did_you_mean(word: str, allowed: Iterable[str], *, cutoff: float = 0.6) -> str:
    """ "; did you mean 'x'?", or an empty string where nothing is near."""
    nearest = difflib.get_close_matches(word, list(allowed), n=1, cutoff=cutoff)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
