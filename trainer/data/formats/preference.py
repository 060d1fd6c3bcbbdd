"""A prompt with answers to compare: a better and a worse one, in each of the ways in which they lie around, or several
candidates with or without a score of each.

prompt, chosen, rejected                  all text or all conversation (TRL's explicit form)
chosen, rejected                          whole conversations that begin alike (TRL's implicit form)
conversations or messages or instruction  what both answer, and chosen, rejected: one message or text (LLaMA-Factory)
input, preferred_output, non_preferred_output                                                        (OpenAI)

candidates, and perhaps scores, in the place of both answers
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainer.data.formats.conversation import conversation
from trainer.data.formats.format import Format
from trainer.data.formats.messages import SHAREGPT_FIELDS, sharegpt_turns
from trainer.data.formats.prompt import ending_with_a_question, read_pair
from trainer.data.formats.single_turn import NAMES
from trainer.data.formats.turn import Turn, plain_turn
from trainer.data.formats.turns import role_named, talk_of, turn_of, turns_of
from trainer.data.formats.values import RowProblem, is_absent, kind_of, text_of
from trainer.data.row import CandidatesRow, ChatRow, PreferenceRow, TextRow

Pair = tuple[str, str]

_PAIRS: tuple[Pair, ...] = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("chosen_messages", "rejected_messages"),
)
_QUESTIONS = ("alpaca", "question_answer", "query_response")
_FEWEST = 2


def _tells(row: Mapping[str, Any]) -> bool:
    """Whether a row has two answers. Beside a conversation of its own it is one only where that is what they answer."""
    pair = _pair_of(row)
    return pair is not None and (row.get("messages") is None or isinstance(row[pair[0]], dict))


def _pair_of(row: Mapping[str, Any]) -> Pair | None:
    return next((pair for pair in _PAIRS if all(row.get(name) is not None for name in pair)), None)


def _read(row: Mapping[str, Any], needs_answer: bool) -> PreferenceRow:
    pair = _pair_of(row) or _PAIRS[0]
    for name in pair:
        if row.get(name) is None:
            found = "null" if name in row else "missing"
            raise RowProblem(f"{name}: is {found}; a preference has prompt, chosen and rejected")
    row = {**row, **{name: talk_of(name, row[name]) for name in pair}}
    if all(_begins_with_a_question(row[name]) for name in pair):
        chosen, rejected = _whole_conversations(row, pair)
    else:
        chosen, rejected = (_answer(row, name) for name in pair)
    if chosen == rejected:
        raise RowProblem(f"{pair[1]}: is the chosen answer, so there is nothing to prefer; leave such rows out")
    return PreferenceRow(chosen, rejected)


def _begins_with_a_question(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    said = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return isinstance(said, str) and role_named(said) in ("system", "developer", "user")


def _whole_conversations(row: Mapping[str, Any], pair: Pair) -> tuple[ChatRow, ChatRow]:
    """Each with its answer, which begins where the two part."""
    chosen, rejected = (turns_of(name, row[name]) for name in pair)
    num_alike = 0
    while num_alike < min(len(chosen), len(rejected)) and chosen[num_alike].message == rejected[num_alike].message:
        num_alike += 1
    for name, turns in zip(pair, (chosen, rejected), strict=True):
        if num_alike == len(turns):
            raise RowProblem(f"{name}: the other answer begins with all of it, so there is nothing to compare")
        if num_alike == 0 or turns[num_alike].role != "assistant":
            raise RowProblem(
                f"{turns[num_alike].place}: {' and '.join(pair)} part here, and only answers may differ; both must "
                "answer the same conversation"
            )
    _check_prompt(row, chosen[:num_alike], pair)
    first, second = (
        conversation(_given(turns, num_alike), row, needs_answer=True, num_given=num_alike, name=name)
        for name, turns in zip(pair, (chosen, rejected), strict=True)
    )
    return first, second


def _given(turns: list[Turn], num_given: int) -> list[Turn]:
    """Without the marks of what both answer: no answer is learnt there, and saying that it were changes nothing."""
    return [replace(turn, mark=None) if index < num_given else turn for index, turn in enumerate(turns)]


def _check_prompt(row: Mapping[str, Any], alike: list[Turn], pair: Pair) -> None:
    """Raises `RowProblem` where a prompt beside whole conversations is not in what they have in common."""
    prompt = talk_of("prompt", row.get("prompt"))
    if isinstance(prompt, list):
        agrees = [turn.message for turn in turns_of("prompt", prompt)] == [turn.message for turn in alike]
    else:
        agrees = prompt is None or any(turn.role == "user" and turn.content == prompt for turn in alike)
    if not agrees:
        raise RowProblem(f"prompt: is not what {' and '.join(pair)} begin with; remove it, or write only their answers")


def _answer(row: Mapping[str, Any], name: str) -> ChatRow | TextRow:
    """The row of what is asked with the answer in this field."""
    if row.get("prompt") is not None:
        return read_pair(row, row[name], name=name)
    if isinstance(row.get("input"), dict):
        tools = row["input"].get("tools")
        row = {**row, "tools": tools} if tools else row
    asking = _asking(row)
    if asking is None:
        raise RowProblem(f"prompt: is missing, which {name} is an answer to")
    turns = [*asking, *_answer_turns(name, row[name])]
    return conversation(turns, row, needs_answer=True, num_given=len(asking), name=name)


def _asking(row: Mapping[str, Any]) -> list[Turn] | None:
    """What both answers answer, where another field than prompt says it."""
    if isinstance(row.get("input"), dict):
        return ending_with_a_question(turns_of("input.messages", row["input"].get("messages")))
    if any(row.get(name) is not None for name in SHAREGPT_FIELDS):
        return ending_with_a_question(sharegpt_turns(row)[1])
    if row.get("messages") is not None:
        return ending_with_a_question(turns_of("messages", row["messages"]))
    names = next((NAMES[name] for name in _QUESTIONS if row.get(NAMES[name].asked) is not None), None)
    return None if names is None else names.question(row)


def _answer_turns(name: str, value: Any) -> list[Turn]:
    """An answer as a list of messages, a single one, or its text."""
    if isinstance(value, list):
        return turns_of(name, value)
    if isinstance(value, dict):
        return [turn_of(name, value)]
    if not isinstance(value, str):
        raise RowProblem(f"{name}: must be an answer, as text or as messages, not {kind_of(value)}")
    return [plain_turn("assistant", name, text_of(name, value))]


def _has_candidates(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("candidates"), list) and not is_absent(row["candidates"])


def _read_candidates(row: Mapping[str, Any], needs_answer: bool) -> CandidatesRow:
    given = row.get("candidates")
    if not isinstance(given, list):
        found = "missing" if given is None else kind_of(given)
        raise RowProblem(f"candidates: must be a list of answers, not {found}; such rows have prompt and candidates")
    if len(given) < _FEWEST:
        raise RowProblem(
            f"candidates: there is nothing to compare, {len(given)} of at least {_FEWEST}; leave such rows out"
        )
    named = {f"candidates.{index}": talk_of(f"candidates.{index}", answer) for index, answer in enumerate(given)}
    if empty := next((name for name, answer in named.items() if is_absent(answer)), None):
        raise RowProblem(f"{empty}: is empty, and every candidate is an answer; leave it out")
    answers = tuple(_answer({**row, **named}, name) for name in named)
    for index, answer in enumerate(answers):
        if answer in answers[:index]:
            raise RowProblem(
                f"candidates.{index}: is candidate {answers.index(answer)} again; name each answer to a prompt once"
            )
    return CandidatesRow(answers, _scores(row.get("scores"), num=len(answers)))


def _scores(scores: Any, *, num: int) -> tuple[float, ...] | None:
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != num:
        found = f"{len(scores)} of them" if isinstance(scores, list) else kind_of(scores)
        raise RowProblem(f"scores: must be a list of {num} numbers, one of each candidate, not {found}")
    for index, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise RowProblem(f"scores.{index}: must be a finite number, not {ascii(score)[:40]}")
    return tuple(map(float, scores))


PREFERENCE = Format("preference", "preference pairs", "chosen and rejected", tells=_tells, read=_read)
CANDIDATES = Format("candidates", "candidate answers", "candidates", tells=_has_candidates, read=_read_candidates)
