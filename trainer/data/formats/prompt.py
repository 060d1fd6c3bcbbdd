"""A prompt with or without its completion, both text or both conversation, and plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.formats.conversation import conversation
from trainer.data.formats.format import Format
from trainer.data.formats.turn import Turn
from trainer.data.formats.turns import talk_of, turns_of, written_answer
from trainer.data.formats.values import RowProblem, field_of, is_absent, text_of
from trainer.data.row import ChatRow, CorpusRow, Row, TextRow
from trainer.data.row_fields import refuse_unread_answer


def _read_completion(row: Mapping[str, Any], needs_answer: bool) -> Row:
    if row.get("completion") is None:
        refuse_unread_answer(row)
    return _read(row, row.get("completion"), needs_answer=needs_answer)


def _read_prompt(row: Mapping[str, Any], needs_answer: bool) -> Row:
    return _read(row, None, needs_answer=needs_answer)


def _read(row: Mapping[str, Any], completion: Any, *, needs_answer: bool) -> Row:
    if completion is None and needs_answer:
        raise RowProblem(
            f"completion: is {'null' if 'completion' in row else 'missing'}, and answers are needed here (with "
            "answers: teacher and teacher.generator: {} the teacher writes those of prompts)"
        )
    return read_pair(row, completion, name="completion")


def read_pair(row: Mapping[str, Any], answer: Any, *, name: str) -> ChatRow | TextRow:
    """The prompt of a row with an answer, null for none, whose field has this name. Messages may be JSON text."""
    prompt = talk_of("prompt", field_of(row, "prompt"))
    if not isinstance(prompt, list):
        return _text_pair(row, written_answer(name, answer), name=name)
    answer = talk_of(name, answer)
    turns = ending_with_a_question(turns_of("prompt", prompt))
    if answer is None:
        return conversation(turns, row, needs_answer=False, num_given=len(turns), name="prompt")
    if isinstance(answer, str):
        raise RowProblem(f"{name}: is text but prompt is a list of messages; both must be the same")
    answers = turns_of(name, answer)
    return conversation([*turns, *answers], row, needs_answer=True, num_given=len(turns), name=name)


def ending_with_a_question(turns: list[Turn]) -> list[Turn]:
    """The turns, which must end where an answer is due. Raises `RowProblem`."""
    last = turns[-1]
    if last.role not in ("user", "tool"):
        raise RowProblem(f"{last.role_place}: a prompt must end with a user turn, not {last.said!r}")
    return turns


def _text_pair(row: Mapping[str, Any], answer: Any, *, name: str) -> TextRow:
    prompt = text_of("prompt", row["prompt"])
    for field in ("system", "tools", "functions", "chat_template_kwargs"):
        if not is_absent(row.get(field)):
            raise RowProblem(f"{field}: belongs to a conversation, and prompt is text; write it as a list of messages")
    if isinstance(answer, list):
        raise RowProblem(f"{name}: is a list of messages but prompt is text; both must be the same")
    return TextRow(prompt, None if answer is None else text_of(name, answer))


def _read_text(row: Mapping[str, Any], needs_answer: bool) -> Row:
    return CorpusRow(text_of("text", field_of(row, "text")))


PROMPT_COMPLETION = Format(
    "prompt_completion",
    "prompt and completion",
    "prompt",
    tells=lambda row: row.get("prompt") is not None,
    read=_read_completion,
)
PROMPT = Format("prompt", "prompts", "prompt", tells=lambda row: False, read=_read_prompt)
TEXT = Format("text", "plain text", "text", tells=lambda row: row.get("text") is not None, read=_read_text)
