"""The token-by-token viewer: the format of samples.json and the text it becomes.

samples.json: `{"before": [sample, ...], "after": [sample, ...]}`, the same sequences in both, where a sample is

    {"id": str, "tokens": [str] * L, "rows": [int] * N,
     "student_logprob": [float] * N, "teacher_logprob": [float] * N, "kl": [float] * N}

Row r is about the prediction of token r + 1 (the shift of `trainer/types.py`), logprobs are of that target id, in
nats; `kl` is the forward KL over the whole vocabulary. Token 0 is never predicted. Missing numbers are null.

generations.json: `{"prompts": [turns], "before": [str], "after": [str], "teacher": [str], "reference": [str]}`, where
turns are `[{"role": str, "content": str}]` and `reference` is the dataset's answer. Every list but `prompts` may be
left out, `before` and `after` while they do not exist yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from launch.report import artifacts
from launch.report.artifacts import Tell
from trainer.records import ignore
from trainer.run_folder import RunFolder, Turn, plain
from trainer.types import SampleTokens


@dataclass(frozen=True, slots=True)
class Judged:
    """The numbers of one predicted token, in nats; None where unknown."""

    student_logprob: float | None
    teacher_logprob: float | None
    kl: float | None

    def data(self) -> str:
        """For the page's script: `student,teacher,kl`, empty where unknown."""
        numbers = (self.student_logprob, self.teacher_logprob, self.kl)
        return ",".join("" if number is None else f"{number:.4f}" for number in numbers)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the viewer; `before` and `after` are None where the loss does not look."""

    text: str
    before: Judged | None
    after: Judged | None

    @property
    def is_judged(self) -> bool:
        return self.before is not None or self.after is not None


@dataclass(frozen=True, slots=True)
class ViewedSequence:
    id: str
    tokens: tuple[Token, ...]
    mean_kl_before: float | None
    mean_kl_after: float | None

    @property
    def title(self) -> str:
        return row_title(self.id, "held-out row")


@dataclass(frozen=True, slots=True)
class Viewer:
    """Everything the viewer shows. A KL of `hottest` nats or more has the strongest colour, a quarter of it half."""

    sequences: tuple[ViewedSequence, ...]
    hottest: float

    @property
    def has_after(self) -> bool:
        return any(sequence.mean_kl_after is not None for sequence in self.sequences)

    def heat(self, judged: Judged | None) -> float:
        """0 (the student agrees with the teacher) to 1."""
        if judged is None or judged.kl is None:
            return 0.0
        return round(min(1.0, math.sqrt(max(0.0, judged.kl) / self.hottest)), 2)


@dataclass(frozen=True, slots=True)
class Answers:
    """A prompt and what was answered; None where that answer does not exist."""

    prompt: tuple[Turn, ...]
    before: str | None
    after: str | None
    teacher: str | None
    reference: str | None


def row_title(name: str, what: str) -> str:
    """For people, who count rows from 1; names are `<task>/<epoch>:<row>`, with `#<text>` behind the first one of a
    row."""
    task, _, place = name.rpartition("/")
    row, _, text = place.partition(":")[2].partition("#")
    of = f" of {task}" if task else ""
    turn = f", its text {int(text) + 1}" if text.isdecimal() else ""
    epoch = place.partition(":")[0]
    again = f", epoch {int(epoch) + 1}" if epoch.isdecimal() and epoch != "0" else ""
    return f"{what} {int(row) + 1:,}{of}{turn}{again}" if row.isdecimal() and epoch.isdecimal() else name


def sample_records(samples: Sequence[SampleTokens], decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """The samples of an evaluation as samples.json wants them. `decode` writes token ids as text."""
    return [
        {
            "id": sample.id,
            "tokens": token_texts(plain(sample.token_ids), decode),
            "rows": plain(sample.rows),
            "student_logprob": _rounded(sample.student_logprob),
            "teacher_logprob": _rounded(sample.teacher_logprob),
            "kl": _rounded(sample.kl),
        }
        for sample in samples
    ]


def token_texts(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text before it. Tokenizers of the sentencepiece kind take the leading space off a
    token that is decoded alone, so each one is decoded behind its predecessor."""
    texts = []
    for before, token in zip([None, *token_ids], token_ids, strict=False):
        alone = decode([token])
        if before is None:
            texts.append(alone)
            continue
        anchor, both = decode([before]), decode([before, token])
        texts.append(both.removeprefix(anchor) if both.startswith(anchor) else alone)
    return texts


def read_viewer(folder: RunFolder, *, tell: Tell = ignore) -> Viewer | None:
    """None where samples.json does not exist or holds nothing. `tell` gets a sentence for what cannot be read."""
    content = artifacts.read_samples(folder, tell=tell)
    before, after = _by_id(content.get("before")), _by_id(content.get("after"))
    order = list(dict.fromkeys([*before, *after]))
    if not order:
        return None
    values = [kl for sample in [*before.values(), *after.values()] for kl in sample["kl"] if kl is not None]
    hottest = max(0.5, float(np.quantile(values, 0.95))) if values else 1.0
    return Viewer(sequences=tuple(_viewed(name, before.get(name), after.get(name)) for name in order), hottest=hottest)


def read_generations(folder: RunFolder, *, tell: Tell = ignore) -> tuple[Answers, ...]:
    """Empty where generations.json does not exist. `tell` gets a sentence for what cannot be read."""
    content = artifacts.read_generations(folder, tell=tell)
    answers = (content.get(name) or [] for name in ("before", "after", "teacher", "reference"))
    rows = zip_longest(content.get("prompts") or [], *answers, fillvalue=None)
    return tuple(Answers(_prompt(prompt), *texts) for prompt, *texts in rows)


def _prompt(turns: Sequence[Turn] | str | None) -> tuple[Turn, ...]:
    """Runs of an earlier version hold the prompt as one text."""
    return ({"role": "", "content": turns},) if isinstance(turns, str) else tuple(turns or ())


def _viewed(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> ViewedSequence:
    texts = (before or after or {})["tokens"]
    judged_before, judged_after = _judged(before), _judged(after)
    tokens = tuple(
        Token(text=text, before=judged_before.get(position), after=judged_after.get(position))
        for position, text in enumerate(texts)
    )
    return ViewedSequence(
        id=name, tokens=tokens, mean_kl_before=_mean(judged_before), mean_kl_after=_mean(judged_after)
    )


def _judged(sample: Mapping[str, Any] | None) -> dict[int, Judged]:
    """By token position: row r judges token r + 1."""
    if sample is None:
        return {}
    columns = zip(sample["rows"], sample["student_logprob"], sample["teacher_logprob"], sample["kl"], strict=True)
    return {row + 1: Judged(student, teacher, kl) for row, student, teacher, kl in columns}


def _mean(judged: Mapping[int, Judged]) -> float | None:
    values = [one.kl for one in judged.values() if one.kl is not None]
    return math.fsum(values) / len(values) if values else None


def _by_id(samples: Sequence[Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    return {sample["id"]: sample for sample in samples or ()}


def _rounded(values: np.ndarray) -> list[float | None]:
    return plain([round(float(value), 5) for value in values])
