"""What the options of a dataset make of its conversations: `system_prompt` and `loss_on` (`configs/prompts.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from trainer.data.row import CandidatesRow, ChatRow, CorpusRow, PreferenceRow, Row
from trainer.errors import ConfigError, DataError

SYSTEM_ROLES = ("system", "developer")


def with_system_prompt(row: Row, system_prompt: str | None) -> Row:
    """The row, with this system turn first where it has none. Raises `ConfigError` for plain text."""
    match row:
        case _ if system_prompt is None:
            return row
        case PreferenceRow() | CandidatesRow():
            return row.each(lambda one: with_system_prompt(one, system_prompt))
        case ChatRow():
            if any(message["role"] in SYSTEM_ROLES for message in row.messages):
                return row
            return replace(
                row,
                messages=({"role": "system", "content": system_prompt}, *row.messages),
                loss_from=row.loss_from and row.loss_from + 1,
                turn_weights={index + 1: weight for index, weight in row.turn_weights.items()},
            )
    raise ConfigError(
        "system_prompt: is put before conversations, and this row is plain text, which has no turns; remove "
        "system_prompt, or write the prompt of such rows as messages"
    )


def refuse_without_turns(row: Row, loss_on: Literal["all", "last"]) -> None:
    """Raises `ConfigError` for plain text of which the last answer is to be learnt."""
    if loss_on == "last" and isinstance(row, CorpusRow):
        raise ConfigError(
            "loss_on: last learns the last answer of conversations, and this row is plain text; remove it"
        )


def learnt_turns(row: ChatRow, loss_on: Literal["all", "last"]) -> dict[int, float]:
    """The assistant turns in the loss, by index, with the weight of each. Raises `DataError` where there is none."""
    answers = [
        index for index, message in enumerate(row.messages) if index >= row.loss_from and message["role"] == "assistant"
    ]
    asked = answers if loss_on == "all" else answers[-1:]
    learnt = {index: weight for index in asked if (weight := row.turn_weights.get(index, 1.0))}
    if not learnt:
        raise DataError(
            f"messages[{asked[0]}]: is the only answer that loss_on: last learns, and is marked as not to be learnt; "
            "leave such rows out, or write loss_on: all"
            if loss_on == "last" and asked
            else "every assistant turn is marked as not to be learnt; leave such rows out"
        )
    return learnt
