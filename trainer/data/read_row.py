"""Validation of one row: what each format requires, and one message for each way to be wrong.

format             fields                                   in the loss
messages           messages: [{role, content}, ...]         every assistant turn that is not marked as context
prompt_completion  prompt, completion: both text or chat    the completion (of a chat: its assistant turns)
prompt             prompt: text or chat                     nothing yet: the answer is to be written
preference         prompt, chosen, rejected: as above       both answers, one row each
text               text                                     every token but the first

Every format but preference may have a field `weight`, which multiplies the loss of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer.data.row import ChatRow, CorpusRow, PreferenceRow, Row, RowFormat, TextRow
from trainer.data.row_fields import (
    LOSS_FLAGS,
    RowProblem,
    loss_mark,
    other_format,
    refuse_row_fields,
    refuse_turn_fields,
    refuse_unread_answer,
    row_weight,
)

MAX_TURNS = 100_000
"""Of a conversation: more are a file in the wrong format."""

_FOLLOWERS = {"start": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


class Message(BaseModel):
    """One turn. Further fields are handed to the chat template, as `apply_chat_template` does."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    role: Literal["system", "user", "assistant"]
    content: str


_CHAT = TypeAdapter(Annotated[list[Message], Field(min_length=1)])
_TEXT = TypeAdapter(str)


def parse_row(value: Mapping[str, Any], *, row_format: RowFormat, needs_answer: bool) -> Row:
    """A validated row, with its weight in the loss. Raises `RowProblem`."""
    pairs = row_format == "preference"
    refuse_row_fields(value, chat=row_format != "text", pairs=pairs)
    weight = row_weight(value, pairs=pairs)
    row = _parse_format(value, row_format=row_format, needs_answer=needs_answer)
    return row if weight == 1.0 else replace(row, weight=weight)


def _parse_format(value: Mapping[str, Any], *, row_format: RowFormat, needs_answer: bool) -> Row:
    for name in ("messages", "prompt", "completion", "chosen", "rejected", "text"):
        if isinstance(value.get(name), list) and len(value[name]) > MAX_TURNS:
            raise RowProblem(f"{name}: has {len(value[name])} turns, the limit is {MAX_TURNS}; split the conversation")
        _refuse_surrogates(name, value.get(name))
    if row_format == "text":
        return CorpusRow(_text("text", _field(_TEXT, value, "text")))
    if row_format == "messages":
        return _chat("messages", _field(_CHAT, value, "messages"), needs_answer=needs_answer)
    if row_format == "preference":
        chosen, rejected = (_parse_answer(value, field) for field in ("chosen", "rejected"))
        if chosen == rejected:
            raise RowProblem("rejected: is the chosen answer, so there is nothing to prefer; leave such rows out")
        return PreferenceRow(chosen, rejected)
    completion = value.get("completion") if row_format == "prompt_completion" else None
    if completion is None and row_format == "prompt_completion":
        refuse_unread_answer(value)
    if completion is None and needs_answer:
        raise RowProblem(
            f"completion: is {'null' if 'completion' in value else 'missing'}, and answers are needed here (with "
            "answers: teacher and teacher.generator: {} the teacher writes those of prompts)"
        )
    return (_parse_chat_pair if isinstance(value.get("prompt"), list) else _parse_text_pair)(value, completion)


def _parse_answer(value: Mapping[str, Any], field: str) -> ChatRow | TextRow:
    """The row of a prompt with the answer in this field."""
    answer = value.get(field)
    if answer is None:
        found = "null" if field in value else "missing"
        raise RowProblem(f"{field}: is {found}; a preference has prompt, chosen and rejected")
    parse = _parse_chat_pair if isinstance(value.get("prompt"), list) else _parse_text_pair
    try:
        return parse({**value, "completion": answer}, answer)
    except RowProblem as problem:
        raise RowProblem(str(problem).replace("completion", field)) from problem


def _parse_text_pair(value: Mapping[str, Any], completion: Any) -> TextRow:
    prompt = _text("prompt", _field(_TEXT, value, "prompt"))
    if completion is None:
        return TextRow(prompt, None)
    if isinstance(completion, list):
        raise RowProblem("completion: is a list of messages but prompt is text; both must be the same")
    return TextRow(prompt, _text("completion", _field(_TEXT, value, "completion")))


def _parse_chat_pair(value: Mapping[str, Any], completion: Any) -> ChatRow:
    prompt = _field(_CHAT, value, "prompt")
    if prompt[-1].role != "user":
        raise RowProblem(f"prompt[{len(prompt) - 1}].role: a prompt must end with a user turn, not {prompt[-1].role!r}")
    if completion is None:
        return _chat("prompt", prompt, needs_answer=False, learnable=False)
    if isinstance(completion, str):
        raise RowProblem("completion: is text but prompt is a list of messages; both must be the same")
    answer = _field(_CHAT, value, "completion")
    _chat("prompt", prompt, needs_answer=False, learnable=False)
    return _chat("completion", answer, needs_answer=True, before=prompt)


def _chat(
    field: str,
    turns: AbstractSequence[Message],
    *,
    needs_answer: bool,
    before: AbstractSequence[Message] = (),
    learnable: bool = True,
) -> ChatRow:
    """Checks the order: an optional system turn, then user and assistant by turns, beginning with user. `learnable`:
    whether assistant turns of this field are answers."""
    role = "start" if not before else before[-1].role
    answers, weights = 0, {}
    for index, turn in enumerate(turns):
        place = f"{field}[{index}]"
        expected = _FOLLOWERS[role]
        if turn.role not in expected:
            after = "the first turn" if role == "start" else f"the turn after {role!r}"
            raise RowProblem(f"{place}.role: {after} must be {' or '.join(expected)}, not {turn.role!r}")
        _text(f"{place}.content", turn.content, may_be_empty=turn.role == "system")
        answers += turn.role == "assistant"
        weight = _turn_weight(turn, place, is_answer=learnable and turn.role == "assistant")
        if weight != 1.0:
            weights[len(before) + index] = weight
        role = turn.role
    if needs_answer and not answers:
        raise RowProblem(f"{field}: no assistant turn, so nothing to learn from")
    if needs_answer and answers == list(weights.values()).count(0.0):
        raise RowProblem(f"{field}: every assistant turn is marked as not to be learnt; leave such rows out")
    if role == "system":
        raise RowProblem(f"{field}: only a system turn; a user turn must follow")
    messages = tuple(_template_input(turn) for turn in (*before, *turns))
    return ChatRow(messages, loss_from=len(before), turn_weights=weights)


def _turn_weight(turn: Message, place: str, *, is_answer: bool) -> float:
    """What the loss of a turn is multiplied by, 1 where it does not say; always 1 where it is no answer."""
    extra = turn.model_extra or {}
    refuse_turn_fields(extra, place=place)
    marked = loss_mark(extra, place=place)
    if marked and not is_answer:
        raise RowProblem(
            f"{place}: is marked as learnt, and only answers are: assistant turns of messages or completion; remove "
            "the mark"
        )
    return marked if is_answer and marked is not None else 1.0


def _template_input(turn: Message) -> Mapping[str, Any]:
    """The fields that the chat template gets. Null counts as absent: tables fill fields of other messages with it."""
    return {k: v for k, v in turn.model_dump().items() if v is not None and k not in LOSS_FLAGS}


def _text(field: str, text: str, *, may_be_empty: bool = False) -> str:
    if not may_be_empty and not text.strip():
        raise RowProblem(f"{field}: is empty")
    return text


def _refuse_surrogates(field: str, value: Any) -> None:
    """JSON can hold lone surrogates, which neither tokenizers nor terminals accept."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            raise RowProblem(f"{field}: is not text: lone surrogate {code} at character {error.start}") from error
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_surrogates(f"{field}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(f"the name of a field of {field}", key)
            _refuse_surrogates(f"{field}.{key}", item)


def _field(kind: TypeAdapter[Any], value: Mapping[str, Any], name: str) -> Any:
    if name not in value:
        raise RowProblem(f"{name}: is missing{other_format(value)}")
    try:
        return kind.validate_python(value[name], strict=True)
    except ValidationError as error:
        raise RowProblem(_explain(name, error.errors()[0])) from error


def _explain(name: str, error: Mapping[str, Any]) -> str:
    field = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
    found = error.get("input")
    kind = "null" if found is None else f"a {_NAMES.get(type(found), type(found).__name__)}"
    match error["type"]:
        case "missing":
            names = found.keys() if isinstance(found, dict) else ()
            hint = " (from and value are ShareGPT's names: write role and content)" if "from" in names else ""
            return f"{field}: is missing{hint}"
        case "string_type":
            return f"{field}: must be text, not {kind}"
        case "list_type":
            return f"{field}: must be a list of {{role, content}} messages, not {kind}"
        case "too_short":
            return f"{field}: is empty"
        case "literal_error":
            return f"{field}: unknown role {ascii(found)[:40]}; write system, user or assistant"
        case "model_type" | "model_attributes_type":
            return f"{field}: must be an object with role and content, not {kind}"
        case _:
            return f"{field}: {error['msg']}"


_NAMES = {str: "string", int: "number", float: "number", bool: "boolean", list: "list", dict: "object"}
