"""Fields of other trainers' formats that change what a row means: read where their meaning is clear, refused otherwise.

Ignoring such a field would train on something else than was meant: the bad answer of `weight: 0`, an answer without the
tools it refers to. Fields not named here (id, source, scores ...) are metadata and allowed. Covered formats: OpenAI
fine-tuning, TRL, axolotl, LLaMA-Factory, ms-swift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.data.formats.values import RowProblem, is_absent

LOSS_FLAGS = ("weight", "loss_weight", "loss", "loss_scale", "loss_mask", "train", "training", "trainable")
"""Of a message: whether it is learnt, or how much. OpenAI: weight 0 or 1; axolotl: train or training; ms-swift: loss,
loss_scale; verl and slime: loss_mask; tinker: trainable."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Of a message: text that only some chat templates render."""

_MEDIA = "only text is supported; remove the field, or leave such rows out"
_ALWAYS = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA)
_PAIR = (
    "belongs to a pair of a better and a worse answer, which format: preference reads; to learn one of them, write it "
    "as completion and remove the other"
)
_PAIRS = dict.fromkeys(("rejected", "non_preferred_output", "rejected_messages"), _PAIR) | {
    "rejected_response": "belongs to a pair of a better and a worse answer, which is read with columns: {prompt: "
    "query, chosen: response, rejected: rejected_response}; to learn the better one, remove the field"
}
_HISTORY = {"history": "is not read here; write the earlier turns into messages"}
_WITH_HISTORY = ("alpaca", "dolly", "query_response", "question_answer", "preference", "candidates", "text")
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
_NO_NUMBERS = " (this one is text, as all cells of a CSV file are: write such rows as JSON lines or parquet)"
_GOOD = ("label", "kto_tag")  # of TRL and LLaMA-Factory: whether the answer is a good one
_ANSWERS = ("chosen", "response", "answer", "output")
_OTHER_FORMATS = (
    (("segments",), "axolotl's segments: write prompt and completion"),
    (("input_ids",), "tokens: give the text, which is tokenised here"),
    (("chosen", "rejected"), "pairs of a better and a worse answer: write what both answer as prompt"),
)


def refuse_row_fields(value: Mapping[str, Any], *, row_format: str) -> None:
    """Raises `RowProblem` for a field of a row that changes its meaning and is not honoured in this format."""
    refused = _ALWAYS | ({} if row_format == "preference" else _PAIRS)
    _refuse(value, refused | ({} if row_format in _WITH_HISTORY else _HISTORY), place="")
    for field in _OTHER_WEIGHTS:
        if value.get(field) is not None and value[field] != 1:
            raise RowProblem(f"{field}: is not read, here it is {value[field]!r}; the weight of a row is named weight")
    for field in _GOOD:
        if _is_false(value.get(field)) and row_format not in ("text", "prompt"):
            raise RowProblem(f"{field}: false marks an answer that must not be learnt; leave such rows out")


def row_weight(value: Mapping[str, Any], *, compared: bool) -> float:
    """What the field `weight` of a row says; 1 where it says nothing. Raises `RowProblem`."""
    weight = value.get("weight")
    if weight is None or weight == 1:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= _LARGEST_WEIGHT:
        raise RowProblem(
            f"weight: must be a number above 0 and up to {_LARGEST_WEIGHT:.0f}, not {ascii(weight)[:40]}; leave out "
            f"rows that are not to be learnt{_NO_NUMBERS if isinstance(weight, str) else ''}"
        )
    if compared:
        raise RowProblem(f"weight: answers to compare cannot be weighted, here it is {weight!r}; remove the field")
    return float(weight)


def _is_false(value: Any) -> bool:
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def refuse_unread_answer(value: Mapping[str, Any]) -> None:
    """Raises `RowProblem` for a prompt whose answer seems to be in a field that is not read."""
    for field in _ANSWERS:
        if not is_absent(value.get(field)):
            raise RowProblem(
                f"{field}: looks like the answer, and only completion is read; write columns: {{completion: {field}}}, "
                "or format: prompt where it is none"
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
