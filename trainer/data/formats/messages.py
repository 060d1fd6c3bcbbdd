"""Conversations: `messages` as OpenAI, TRL and most trainers write them, and `conversations` as ShareGPT does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.formats.conversation import conversation
from trainer.data.formats.format import Format
from trainer.data.formats.turn import Turn, plain_turn
from trainer.data.formats.turns import turns_of
from trainer.data.formats.values import RowProblem, field_of, json_of, text_of
from trainer.data.row import Row

SHAREGPT_FIELDS = ("conversations", "conversation")


def _read_messages(row: Mapping[str, Any], needs_answer: bool) -> Row:
    turns = turns_of("messages", field_of(row, "messages"))
    return conversation(turns, row, needs_answer=needs_answer, name="messages")


def _read_sharegpt(row: Mapping[str, Any], needs_answer: bool) -> Row:
    name, turns = sharegpt_turns(row)
    return conversation(turns, row, needs_answer=needs_answer, name=name)


def sharegpt_turns(row: Mapping[str, Any]) -> tuple[str, list[Turn]]:
    """The name of the field that has the conversation, and its turns."""
    name = next((name for name in SHAREGPT_FIELDS if row.get(name) is not None), SHAREGPT_FIELDS[0])
    value = field_of(row, name)
    if isinstance(value, str):
        value = json_of(name, value, what="a list of {from, value} turns")
    if isinstance(value, list) and value and all(isinstance(one, dict) and _is_exchange(one) for one in value):
        return name, [turn for index, one in enumerate(value) for turn in _exchange(f"{name}[{index}]", one)]
    return name, turns_of(name, value)


def _is_exchange(value: Mapping[str, Any]) -> bool:
    return "assistant" in value and ("human" in value or "user" in value)


def _exchange(place: str, value: Mapping[str, Any]) -> list[Turn]:
    """Two turns in one object, `{human, assistant}`, as ms-swift writes them."""
    asking = "human" if "human" in value else "user"
    if more := [key for key in value if key not in (asking, "assistant") and value[key] is not None]:
        raise RowProblem(f"{place}.{more[0]}: is not read; a turn of this kind has {asking} and assistant")
    return [
        plain_turn(role, f"{place}.{key}", text_of(f"{place}.{key}", value[key]))
        for role, key in (("user", asking), ("assistant", "assistant"))
    ]


MESSAGES = Format(
    "messages", "messages", "messages", tells=lambda row: row.get("messages") is not None, read=_read_messages
)
SHAREGPT = Format(
    "sharegpt",
    "ShareGPT",
    "conversations",
    tells=lambda row: any(row.get(name) is not None for name in SHAREGPT_FIELDS),
    read=_read_sharegpt,
)
