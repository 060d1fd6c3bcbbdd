"""Rows in the conventional formats, validated: what a row must hold, and one clear message for each way to be wrong.

format             fields                                   in the loss
messages           messages: [{role, content}, ...]         every assistant turn
prompt_completion  prompt, completion: both text or chat    the completion (of a chat: its assistant turns)
prompt             prompt: text or chat                     nothing yet: the answer is to be written
text               text                                     every token but the first
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.schema import Dataset
from trainer.errors import DataError
from trainer.row_files import BadRow, RawRows, open_raw_rows

RowFormat = Literal["messages", "prompt_completion", "prompt", "text"]

_FIELDS: Mapping[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "prompt": ("prompt",),
    "text": ("text",),
}
"""In the order in which `auto` looks for them: a dataset with messages and prompt columns is read by its messages."""


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation. Assistant turns from index `loss_from` on are answers; the ones before are given context."""

    messages: tuple[Mapping[str, Any], ...]
    loss_from: int

    @property
    def answered(self) -> bool:
        """Whether the last turn is an answer; if not, one is wanted there."""
        return self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True, slots=True)
class TextRow:
    """Text to be continued, outside any chat template. `completion` None: it is to be written."""

    prompt: str
    completion: str | None


@dataclass(frozen=True, slots=True)
class CorpusRow:
    """Plain text, all of it to be learnt."""

    text: str


Row = ChatRow | TextRow | CorpusRow


@dataclass(frozen=True, slots=True)
class Rows:
    """A dataset of one format, read row by row."""

    raw: RawRows
    format: RowFormat

    @classmethod
    def open(cls, dataset: Dataset) -> Rows:
        """Raises as `open_raw_rows` does, and `DataError` where the columns fit no format."""
        raw = open_raw_rows(dataset)
        return cls(raw=raw, format=_choose_format(raw, dataset.format))

    def __len__(self) -> int:
        return len(self.raw)

    def read(self, row: int, *, needs_answer: bool) -> Row:
        """Raises `BadRow` naming place and field. Without `needs_answer` a missing answer is no mistake."""
        value = self.raw.raw(row)
        try:
            return parse_row(value, row_format=self.format, needs_answer=needs_answer)
        except RowProblem as problem:
            raise BadRow(self.raw.origin(row), str(problem), preview(value)) from problem


_FOLLOWERS = {"start": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


class RowProblem(ValueError):
    """What is wrong with a row, field first; the place is added by who knows it."""


class Message(BaseModel):
    """One turn. Further fields are handed to the chat template, as `apply_chat_template` does."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    role: Literal["system", "user", "assistant"]
    content: str


_Chat = Annotated[list[Message], Field(min_length=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _MessagesFields(_Fields):
    messages: _Chat


class _TextPrompt(_Fields):
    prompt: str


class _ChatPrompt(_Fields):
    prompt: _Chat


class _TextCompletion(_Fields):
    completion: str


class _ChatCompletion(_Fields):
    completion: _Chat


class _TextFields(_Fields):
    text: str


def parse_row(value: Mapping[str, Any], *, row_format: RowFormat, needs_answer: bool) -> Row:
    """A validated row. Raises `RowProblem`."""
    if value.get("tools"):
        raise RowProblem("tools: tool calls are not supported; remove the field")
    if row_format == "text":
        return CorpusRow(_text("text", _validate(_TextFields, value).text))
    if row_format == "messages":
        return _chat("messages", _validate(_MessagesFields, value).messages, needs_answer=needs_answer)
    completion = value.get("completion") if row_format == "prompt_completion" else None
    if completion is None and needs_answer:
        raise RowProblem(f"completion: is {'null' if 'completion' in value else 'missing'}")
    return (_parse_chat_pair if isinstance(value.get("prompt"), list) else _parse_text_pair)(value, completion)


def preview(value: Any, limit: int = 200) -> str:
    """A row on one short line, for people."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _parse_text_pair(value: Mapping[str, Any], completion: Any) -> TextRow:
    prompt = _text("prompt", _validate(_TextPrompt, value).prompt)
    if completion is None:
        return TextRow(prompt, None)
    if isinstance(completion, list):
        raise RowProblem("completion: is a list of messages but prompt is text; both must be the same")
    return TextRow(prompt, _text("completion", _validate(_TextCompletion, value).completion))


def _parse_chat_pair(value: Mapping[str, Any], completion: Any) -> ChatRow:
    prompt = _validate(_ChatPrompt, value).prompt
    if prompt[-1].role != "user":
        raise RowProblem(f"prompt[{len(prompt) - 1}].role: a prompt must end with a user turn, not {prompt[-1].role!r}")
    if completion is None:
        return _chat("prompt", prompt, needs_answer=False)
    if isinstance(completion, str):
        raise RowProblem("completion: is text but prompt is a list of messages; both must be the same")
    answer = _validate(_ChatCompletion, value).completion
    _chat("prompt", prompt, needs_answer=False)
    return _chat("completion", answer, needs_answer=True, before=prompt)


def _chat(
    field: str, turns: AbstractSequence[Message], *, needs_answer: bool, before: AbstractSequence[Message] = ()
) -> ChatRow:
    """Checks the order: an optional system turn, then user and assistant by turns, beginning with user."""
    role = "start" if not before else before[-1].role
    for index, turn in enumerate(turns):
        place = f"{field}[{index}]"
        expected = _FOLLOWERS[role]
        if turn.role not in expected:
            after = "the first turn" if role == "start" else f"the turn after {role!r}"
            raise RowProblem(f"{place}.role: {after} must be {' or '.join(expected)}, not {turn.role!r}")
        _text(f"{place}.content", turn.content, may_be_empty=turn.role == "system")
        if (turn.model_extra or {}).get("tool_calls"):
            raise RowProblem(f"{place}.tool_calls: tool calls are not supported")
        role = turn.role
    if needs_answer and not any(turn.role == "assistant" for turn in turns):
        raise RowProblem(f"{field}: no assistant turn, so nothing to learn from")
    if role == "system":
        raise RowProblem(f"{field}: only a system turn; a user turn must follow")
    # Tables fill fields that only other messages have with null: null is as good as absent.
    messages = tuple({k: v for k, v in turn.model_dump().items() if v is not None} for turn in (*before, *turns))
    return ChatRow(messages, loss_from=len(before))


def _text(field: str, text: str, *, may_be_empty: bool = False) -> str:
    if not may_be_empty and not text.strip():
        raise RowProblem(f"{field}: is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise RowProblem(f"{field}: is not text: lone surrogate {code} at character {error.start}") from error
    return text


def _validate(model: type[_Fields], value: Mapping[str, Any]) -> Any:
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        raise RowProblem(_explain(error.errors()[0])) from error


def _explain(error: Mapping[str, Any]) -> str:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    found = error.get("input")
    kind = "null" if found is None else f"a {_NAMES.get(type(found), type(found).__name__)}"
    match error["type"]:
        case "missing":
            return f"{field}: is missing"
        case "string_type":
            return f"{field}: must be text, not {kind}"
        case "list_type":
            return f"{field}: must be a list of {{role, content}} messages, not {kind}"
        case "too_short":
            return f"{field}: is empty"
        case "literal_error":
            return f"{field}: unknown role {found!r}; write system, user or assistant"
        case "model_type" | "model_attributes_type":
            return f"{field}: must be an object with role and content, not {kind}"
        case _:
            return f"{field}: {error['msg']}"


_NAMES = {str: "string", int: "number", float: "number", bool: "boolean", list: "list", dict: "object"}


def _choose_format(raw: RawRows, wanted: str) -> RowFormat:
    found = ", ".join(raw.columns) or "none"
    for row_format, fields in _FIELDS.items():
        if wanted in ("auto", row_format) and all(field in raw.columns for field in fields):
            return row_format
    if wanted != "auto":
        need = " and ".join(_FIELDS[wanted])
        raise DataError(f"{raw.name}: no row has the field(s) {need} of format {wanted}; fields found: {found}")
    if not raw.columns:
        raw.raw(0)  # no row could be decoded: the first one says why
    raise DataError(
        f"{raw.name}: the fields fit no format; found: {found}; "
        "needed: messages, or prompt and completion, or prompt, or text"
    )
