"""The held-out rows and texts where the student is furthest from the teacher: a few of each, whatever is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from configs.section import MAIN
from trainer.checks.evaluate import EvaluationRows
from trainer.checks.shown import First, Worst, WorstText, WorstToken
from trainer.types import SampleTokens, Sequence

if TYPE_CHECKING:
    from trainer.loop.staging import HeldOutBatch

TOKENS, TEXTS = 12, 3
BEFORE, AFTER = 24, 8
"""Tokens of the text around one."""
MAX_TOKENS = 256
"""Of a text; from its first loss row on, and some before it."""


@dataclass(frozen=True, slots=True)
class RowsOfText:
    """Where the rows of one held-out text are in its batch."""

    position: int  # of the text among those of the rank
    sequence: Sequence
    shown: np.ndarray  # int64 [N] loss rows that a teacher scored
    student: np.ndarray  # int64 [N], of them in the columns of all rows
    scored: slice  # in the columns of scored rows


def texts_of(item: HeldOutBatch) -> Iterator[RowsOfText]:
    """The texts of a batch that was scored, in order."""
    start, first_row = 0, 0
    for position, unit, inside in item.members:
        sequence = unit.sequences[inside]
        rows = np.flatnonzero(sequence.loss_mask)
        all_rows = np.arange(first_row, first_row + len(rows))
        first_row += len(rows)
        aligned = sequence.aligned_rows
        own = np.ones(len(rows), dtype=bool) if aligned is None else aligned
        part = slice(start, start + int(own.sum()))
        start = part.stop
        yield RowsOfText(position, sequence, rows[own], all_rows[own], part)


def name_of(sequence: Sequence) -> str:
    return sequence.id if sequence.task == MAIN else f"{sequence.task}/{sequence.id}"


def worst_of(item: HeldOutBatch, rows: EvaluationRows) -> Worst:
    """Of one batch."""
    if not len(rows.kl):
        return Worst()
    kl = rows.kl.cpu().numpy()
    texts = [text for text in texts_of(item) if len(text.shown)]
    far = set(np.argsort(-np.where(np.isfinite(kl), kl, -1.0), kind="stable")[:TOKENS].tolist())
    tokens = [
        _token(text, n, rows)
        for text in texts
        for n in range(len(text.shown))
        if text.scored.start + n in far and np.isfinite(kl[text.scored.start + n])
    ]
    means = {text.position: float(kl[text.scored].mean()) for text in texts}
    finite = [text for text in texts if np.isfinite(means[text.position])]
    furthest = sorted(finite, key=lambda text: -means[text.position])[:TEXTS]
    return Worst(tuple(tokens), tuple(_text(text, means[text.position], rows) for text in furthest))


def combined(parts: Iterable[Worst]) -> Worst:
    """The worst of all parts."""
    parts = list(parts)
    tokens = tuple(token for part in parts for token in part.tokens)
    return Worst(tokens, tuple(text for part in parts for text in part.texts)).cut(TOKENS, TEXTS)


def _token(text: RowsOfText, n: int, rows: EvaluationRows) -> WorstToken:
    at, own, scored = int(text.shown[n]) + 1, int(text.student[n]), text.scored.start + n
    ids = text.sequence.token_ids
    return WorstToken(
        id=name_of(text.sequence),
        kl=float(rows.kl[scored]),
        before=ids[max(0, at - BEFORE) : at],
        token=ids[at : at + 1],
        after=ids[at + 1 : at + 1 + AFTER],
        student_logprob=float(rows.student_logprob[own]),
        teacher_logprob=None if text.sequence.aligned_rows is not None else float(rows.teacher_logprob[scored]),
        student_first=First(int(rows.student_first[own]), float(rows.student_first_logprob[own])),
        teacher_first=First(int(rows.teacher_first[scored]), float(rows.teacher_first_logprob[scored])),
    )


def _text(text: RowsOfText, mean: float, rows: EvaluationRows) -> WorstText:
    first = max(0, int(text.shown[0]) - BEFORE)
    kept = text.shown + 1 < first + MAX_TOKENS
    student, scored = text.student[kept], np.arange(text.scored.start, text.scored.stop)[kept]
    shown = SampleTokens(
        id=name_of(text.sequence),
        token_ids=text.sequence.token_ids[first : first + MAX_TOKENS],
        rows=text.shown[kept] - first,
        student_logprob=rows.student_logprob[student].cpu().numpy(),
        teacher_logprob=rows.teacher_logprob[scored].cpu().numpy(),
        kl=rows.kl[scored].cpu().numpy(),
    )
    return WorstText(mean, len(text.shown), shown)
