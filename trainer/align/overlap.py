"""Alignment `overlap`: both distributions over the tokens that both vocabularies have, and one event of all the others.

A row of the student and one of the teacher before which the same bytes stand predict the continuation of the same text.
What they give a token that only one of them has is mass of the last event, on either side, so that nothing is
renormalised. It stays an approximation: p("12") of a teacher whose tokens reach "123" is not that of one whose do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.alignment import Overlap
from trainer.align.rows import Chunks, Span, align_rows
from trainer.labels.encoding import ABSENT, ALIGNED, Encoding
from trainer.labels.kept import kept_and_tail
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.align.aligner import SharedIds
    from trainer.model.head import Head


class Aligner(Overlap):
    """See `trainer/align/aligner.py`."""

    def groups(self, student: tuple[Span, ...], teacher: tuple[Span, ...]) -> Chunks:
        return single_rows(student, teacher)

    def encoding(self, encoding: Encoding, shared: SharedIds) -> Encoding:
        return OverlapEncoding(encoding, shared)


def single_rows(student: tuple[Span, ...], teacher: tuple[Span, ...]) -> Chunks:
    """Rows that begin at the same byte, as chunks of one row each."""
    rows = align_rows(student, teacher)
    sides = [np.full(sum(len(span.starts) for span in side), -1, dtype=np.int64) for side in (student, teacher)]
    for side, own in zip(sides, (rows.student, rows.teacher), strict=True):
        side[own] = np.arange(len(own))
    return Chunks(sides[0], sides[1], len(rows.student))


class AlignedEncoding:
    """An encoding on the student's side, of another vocabulary: `align` alone is another one."""

    def __init__(self, encoding: Encoding, shared: SharedIds) -> None:
        self._encoding = encoding
        self._shared = shared

    def __getattr__(self, name: str) -> object:
        return getattr(self._encoding, name)

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        return {**self._encoding.prepare(labels, teacher_head), ALIGNED: labels[ALIGNED]}


class OverlapEncoding(AlignedEncoding):
    """Over the ids that are shared."""

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None
    ) -> PairedLogProbs:
        """Student logits [n, V]; of `topk` K + 1 events, of the others one of each shared id and one of the rest."""
        if self._encoding.kind == "topk":
            return self._kept(logits, labels)
        pair = self._encoding.align(logits.new_zeros(logits.shape[0], self._shared.num_teacher), labels, teacher_head)
        student = (logits / self._encoding.temperature).log_softmax(1)
        return self._shared.pair(student, pair.teacher)

    def _kept(self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor]) -> PairedLogProbs:
        """Kept ids that the student lacks are events that neither has, their mass is in the tail."""
        ids = self._shared.of_teacher[labels["ids"].long()]
        known, temperature = ids >= 0, self._encoding.temperature
        # In the place of what the student lacks another kept id, whose second event counts for nothing.
        instead = ids.gather(1, known.int().argmax(1, keepdim=True)).clamp(min=0)
        events = kept_and_tail(logits, ids.where(known, instead), temperature)
        student = torch.cat([torch.where(known, events[:, :-1], ABSENT), events[:, -1:]], dim=1)
        logprobs, tail = (labels[name].to(logits.dtype) for name in ("logprobs", "tail"))
        rest = torch.cat([tail, torch.where(known, ABSENT, logprobs)], dim=1).logsumexp(1, keepdim=True)
        teacher = torch.cat([torch.where(known, logprobs, ABSENT), rest], dim=1)
        return PairedLogProbs(student.log_softmax(1), teacher.log_softmax(1), exhaustive=False)
