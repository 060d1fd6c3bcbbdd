"""What to write for rows of no known format: the mapping that their names and values suggest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_QUESTIONS = ("question", "query", "instruction", "problem", "prompt", "input", "inputs", "user", "human", "source")
_ANSWERS = ("answer", "response", "output", "outputs", "solution", "completion", "target", "targets", "assistant")
_ANY = "fields of other names are mapped, as with columns: {question: problem, answer: solution}"


def columns_for(row: Mapping[str, Any]) -> str:
    """For messages: the `columns` that would read this row, or how they are written."""
    fields = dict(_fields(row))
    talk = next((name for name, value in fields.items() if _is_conversation(value)), None)
    if talk is not None:
        return f"to read {_shown(talk)} as the conversation write columns: {{messages: {_shown(talk)}}}"
    asked, answered = (_first(names, fields) for names in (_QUESTIONS, _ANSWERS))
    if asked and answered:
        return (
            f"to read these as a conversation write columns: {{question: {_shown(asked)}, answer: {_shown(answered)}}}"
        )
    if answered:
        return f"to learn {_shown(answered)} as plain text write columns: {{text: {_shown(answered)}}}"
    if asked:
        return (
            f"to have {_shown(asked)} answered by the teacher write format: question_answer, columns: {{question: "
            f"{_shown(asked)}}}"
        )
    return _ANY


def _fields(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those of the row, then those of objects in it with dots."""
    yield from row.items()
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inside}", found) for inside, found in value.items())


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, Mapping) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
            for turn in value
        )
    )


def _first(names: tuple[str, ...], fields: Mapping[str, Any]) -> str | None:
    """The first of the fields with text whose name is the one of these that comes first."""
    found = [name for name, value in fields.items() if isinstance(value, str) and value.strip()]
    return next((field for name in names for field in found if field.rpartition(".")[2].lower() == name), None)


def _shown(name: str) -> str:
    return name if name.isprintable() and name.isascii() else ascii(name)
