"""Held-out text where the student is furthest from the teacher: the format of worst.json and what the page shows of it.

worst.json: `{"step": int, "tokens": [token, ...], "texts": [text, ...]}`, of the last evaluation, furthest first. A
token is what `WorstToken` of `trainer/checks/shown.py` says, with texts for ids; a text has `kl`, the mean of all its
rows, their number `rows`, and `shown`, its beginning as samples.json has it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launch.report import artifacts
from launch.report.artifacts import Tell, WorstTextRecord, WorstTokenRecord
from launch.report.numbers import percent
from launch.report.viewer import row_title, sample_records, token_texts
from trainer.checks.shown import First, Worst, WorstToken
from trainer.records import ignore
from trainer.run_folder import RunFolder, plain

Decode = Callable[[list[int]], str]


def worst_records(worst: Worst, step: int, decode: Decode) -> dict[str, Any]:
    """As worst.json wants them. `decode` writes ids of the student's vocabulary as text."""
    texts = sample_records([text.shown for text in worst.texts], decode)
    return {
        "step": step,
        "tokens": [_token(one, decode) for one in worst.tokens],
        "texts": [
            {"kl": round(text.kl, 4), "rows": text.num_rows, "shown": shown}
            for text, shown in zip(worst.texts, texts, strict=True)
        ],
    }


def _token(one: WorstToken, decode: Decode) -> dict[str, Any]:
    read = token_texts([*plain(one.before), *plain(one.token), *plain(one.after)], decode)
    at = len(one.before)

    def first(likeliest: First) -> dict[str, Any]:
        text = token_texts([int(one.before[-1]), likeliest.id], decode)[-1] if likeliest.id >= 0 else None
        return {"text": text, "logprob": _number(likeliest.logprob)}

    return {
        "id": one.id,
        "kl": round(one.kl, 4),
        "before": "".join(read[:at]),
        "token": read[at],
        "after": "".join(read[at + 1 :]),
        "student": _number(one.student_logprob),
        "teacher": None if one.teacher_logprob is None else _number(one.teacher_logprob),
        "student_first": first(one.student_first),
        "teacher_first": first(one.teacher_first),
    }


def _number(logprob: float) -> float | None:
    return round(logprob, 4) if math.isfinite(logprob) else None


@dataclass(frozen=True, slots=True)
class FarToken:
    """A row of the table."""

    title: str
    kl: float
    before: str
    token: str
    after: str
    of_teacher: str  # its probability of the token
    of_student: str
    teacher_first: str | None  # None: a token that the student has not
    student_first: str | None
    first_of_teacher: str  # probability of its own likeliest
    first_of_student: str


@dataclass(frozen=True, slots=True)
class FarText:
    """A text with the KL of each token: None where the loss does not look."""

    title: str
    kl: float
    num_rows: int
    tokens: tuple[tuple[str, float | None], ...]
    is_cut: bool

    def heat(self, kl: float, hottest: float) -> float:
        return round(min(1.0, math.sqrt(max(0.0, kl) / hottest)), 2)


@dataclass(frozen=True, slots=True)
class Furthest:
    """What the section shows."""

    step: int
    tokens: tuple[FarToken, ...]
    texts: tuple[FarText, ...]

    @property
    def hottest(self) -> float:
        """The KL of the strongest colour: that of the last of the worst tokens."""
        return max(0.5, min((one.kl for one in self.tokens), default=1.0))


def read_worst(folder: RunFolder, *, tell: Tell = ignore) -> Furthest | None:
    """None where worst.json does not exist or holds nothing. `tell` gets a sentence for what cannot be read."""
    found = artifacts.read_worst(folder, tell=tell)
    tokens, texts = found.get("tokens", []), found.get("texts", [])
    if not tokens and not texts:
        return None
    return Furthest(found.get("step", 0), tuple(map(_far_token, tokens)), tuple(map(_far_text, texts)))


def _far_token(one: WorstTokenRecord) -> FarToken:
    teacher, student = one["teacher_first"], one["student_first"]
    return FarToken(
        row_title(one["id"], "row"),
        one["kl"],
        one["before"],
        one["token"] if one["token"].strip() else _visible(one["token"]),
        one["after"],
        _chance(one["teacher"]),
        _chance(one["student"]),
        None if teacher["text"] is None else _visible(teacher["text"]),
        None if student["text"] is None else _visible(student["text"]),
        _chance(teacher["logprob"]),
        _chance(student["logprob"]),
    )


def _far_text(one: WorstTextRecord) -> FarText:
    shown = one["shown"]
    by_token = {row + 1: kl for row, kl in zip(shown["rows"], shown["kl"], strict=True)}
    tokens = tuple((text, by_token.get(at)) for at, text in enumerate(shown["tokens"]))
    return FarText(row_title(shown["id"], "held-out row"), one["kl"], one["rows"], tokens, one["rows"] > len(by_token))


def _visible(text: str) -> str:
    r"""A line break as `\n`, a space at the beginning as one that no line is broken at: as the page's scripts do."""
    return re.sub("^ ", "\u00a0", json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"'))


def _chance(logprob: float | None) -> str:
    return "not known" if logprob is None else percent(math.exp(min(0.0, logprob)))
