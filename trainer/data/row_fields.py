"""Fields of other trainers' formats that change what a row means: read where their meaning is clear, refused otherwise.

Ignoring such a field would train on something else than was meant: the bad answer of `weight: 0`, an answer without the
tools it refers to. Fields not named here (id, source, scores ...) are metadata and allowed. Covered formats: OpenAI
fine-tuning, TRL, axolotl, LLaMA-Factory, ms-swift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class RowProblem(ValueError):
    """What is wrong with a row, field first; the caller adds file and line."""


LOSS_FLAGS = ("weight", "loss_weight", "loss", "loss_scale", "loss_mask", "train", "training", "trainable")
"""Of a message: whether it is learnt, or how much. OpenAI: weight 0 or 1; axolotl: train or training; ms-swift: loss,
loss_scale; verl and slime: loss_mask; tinker: trainable."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Of a message: text that only some chat templates render."""

_TOOLS = "tool calls are not supported; remove the field, or leave such rows out"
_MEDIA = "only text is supported; remove the field, or leave such rows out"
_ALWAYS = dict.fromkeys(("tools", "functions", "function_call", "tool_calls", "tool_call_id"), _TOOLS) | dict.fromkeys(
    ("image", "images", "video", "videos", "audio", "audios"), _MEDIA
)
_IN_ROWS = _ALWAYS | {
    "chat_template_kwargs": "options of single rows are not handed to the chat template; write them into a template of "
    "your own and name it with teacher.chat_template",
}
_REJECTED = {
    "rejected": "pairs of a better and a worse answer are read from rows with prompt, chosen and rejected (format: "
    "preference); to learn one of them, write it as completion and remove the other",
}
_IN_CHATS = {
    "system": "is not read here; write it as the first message, with role: system",
    "history": "is not read here; write the earlier turns into messages",
}
_IN_TURNS = _ALWAYS | {
    "masked": "means the opposite of a mark that is read here; write weight: 0 for a message that is not learnt",
    "train_detail": "parts of a message cannot be left out of the loss; split the message or remove the field",
    "training_detail": "parts of a message cannot be left out of the loss; split the message or remove the field",
    "refusal": "is not read; write its text as content",
    "prefix": "an answer that begins with given text is not supported; leave such rows out",
    "partial": "an answer that begins with given text is not supported; leave such rows out",
}
_OTHER_WEIGHTS = ("loss_weight", "loss_scale", "sample_weight")
_LARGEST_WEIGHT = 1e6
_ANSWERS = ("chosen", "response", "answer", "output")
_OTHER_FORMATS = (
    (("conversations",), "ShareGPT's format: rename conversations to messages, from to role (human to user, gpt to "
     "assistant) and value to content"),
    (("instruction", "output"), "Alpaca's format: write instruction and input together as prompt, output as "
     "completion"),
    (("query", "response"), "ms-swift's format: rename query to prompt and response to completion"),
    (("question", "answer"), "rename question to prompt and answer to completion"),
    (("chosen", "rejected"), "pairs of a better and a worse answer: write what both answer as prompt"),
    (("segments",), "axolotl's segments: write prompt and completion"),
    (("input_ids",), "tokens: give the text, which is tokenised here"),
)  # fmt: skip


def is_absent(value: Any) -> bool:
    """Whether a field says nothing: tables fill what only other rows have with null or emptiness."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def refuse_row_fields(value: Mapping[str, Any], *, chat: bool, pairs: bool = False) -> None:
    """Raises `RowProblem` for a field of a row that changes its meaning and is not honoured."""
    _refuse(value, _IN_ROWS | (_IN_CHATS if chat else {}) | ({} if pairs else _REJECTED), place="")
    for field in _OTHER_WEIGHTS:
        if value.get(field) is not None and value[field] != 1:
            raise RowProblem(f"{field}: is not read, here it is {value[field]!r}; the weight of a row is named weight")
    if value.get("label") is False and "completion" in value:
        raise RowProblem("label: false marks an answer that must not be learnt; leave such rows out")


def row_weight(value: Mapping[str, Any], *, pairs: bool) -> float:
    """What the field `weight` of a row says; 1 where it says nothing. Raises `RowProblem`."""
    weight = value.get("weight")
    if weight is None or weight == 1:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= _LARGEST_WEIGHT:
        raise RowProblem(
            f"weight: must be a number above 0 and up to {_LARGEST_WEIGHT:.0f}, not {ascii(weight)[:40]}; leave out "
            "rows that are not to be learnt"
        )
    if pairs:
        raise RowProblem(f"weight: a pair of answers cannot be weighted, here it is {weight!r}; remove the field")
    return float(weight)


def refuse_unread_answer(value: Mapping[str, Any]) -> None:
    """Raises `RowProblem` for a prompt whose answer seems to be in a field that is not read."""
    for field in _ANSWERS:
        if not is_absent(value.get(field)):
            raise RowProblem(
                f"{field}: looks like the answer, and only completion is read; rename it to completion, or write "
                "format: prompt for this dataset where it is none"
            )


def refuse_turn_fields(extra: Mapping[str, Any], *, place: str) -> None:
    """The same for the fields of one message beside role and content."""
    _refuse(extra, _IN_TURNS, place=f"{place}.")


def loss_mark(extra: Mapping[str, Any], *, place: str) -> float | None:
    """What a message says that its loss is multiplied by, 0 where it is context; None where it does not say. Raises
    `RowProblem` for what is no weight, and for marks that contradict each other."""
    given = {field: extra[field] for field in LOSS_FLAGS if extra.get(field) is not None}
    for field, value in given.items():
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= _LARGEST_WEIGHT:
            raise RowProblem(
                f"{place}.{field}: {ascii(value)[:40]} is no weight: a message is learnt (1, true), is context (0, "
                f"false), or counts more or less (a number up to {_LARGEST_WEIGHT:.0f})"
            )
    if len({float(value) for value in given.values()}) > 1:
        raise RowProblem(f"{place}: {' and '.join(given)} contradict each other; keep one of them")
    return float(next(iter(given.values()))) if given else None


def other_format(fields: Iterable[str]) -> str:
    """The known format that has these fields, and how to convert it; empty for none."""
    found = set(fields)
    return next((f"; {text}" for needed, text in _OTHER_FORMATS if found.issuperset(needed)), "")


def _refuse(value: Mapping[str, Any], refused: Mapping[str, str], *, place: str) -> None:
    for field, text in refused.items():
        if not is_absent(value.get(field)):
            raise RowProblem(f"{place}{field}: {text}")
