"""Alignment `uld`: all probabilities of both vocabularies, the smaller one filled up with tokens of probability 0.

Universal logit distillation (arXiv 2402.12030) compares them sorted (`uld` in trainer/losses), so that it does not
matter which tokens they are of. Rows are those that begin at the same byte, where the paper takes the i-th of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from configs.alignment import Uld
from trainer.align.overlap import AlignedEncoding, single_rows
from trainer.align.rows import Chunks, Span
from trainer.labels.encoding import ABSENT, Encoding
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.align.aligner import SharedIds
    from trainer.model.head import Head


class Aligner(Uld):
    """See `trainer/align/aligner.py`."""

    def groups(self, student: tuple[Span, ...], teacher: tuple[Span, ...]) -> Chunks:
        return single_rows(student, teacher)

    def encoding(self, encoding: Encoding, shared: SharedIds) -> Encoding:
        return UldEncoding(encoding, shared)


class UldEncoding(AlignedEncoding):
    """Over whole distributions."""

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None
    ) -> PairedLogProbs:
        """[n, max(V of the student, V of the teacher)]; ids mean different tokens on both sides."""
        n, most = logits.shape[0], max(self._shared.num_teacher, self._shared.num_student)
        teacher = self._encoding.align(logits.new_zeros(n, self._shared.num_teacher), labels, teacher_head).teacher
        student = (logits / self._encoding.temperature).log_softmax(1)
        sides = [functional.pad(side, (0, most - side.shape[1]), value=ABSENT) for side in (student, teacher)]
        return PairedLogProbs(*sides, exhaustive=True)
