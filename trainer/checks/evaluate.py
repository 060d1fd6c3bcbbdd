"""The row mathematics of an evaluation: exact, over the full vocabulary, whatever the labels of the training are.

One file for the rows of a rank and for adding ranks up, so that what is reported as KL is never a top-k bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

from trainer.losses.kl import forward_kl
from trainer.model.fast import cache_blocks
from trainer.model.head import Head, HeadShape
from trainer.types import Evaluation, PairedLogProbs


@dataclass(frozen=True, slots=True)
class EvaluationRows:
    """Per loss row, on the device; log-probabilities of the target id. M is N, or 0 where no teacher scored
    the rows."""

    kl: torch.Tensor  # float32 [M] KL(teacher, student) in nats
    agree: torch.Tensor  # bool [M] both argmax are equal
    student_logprob: torch.Tensor  # float32 [N]
    teacher_logprob: torch.Tensor  # float32 [M]
    padding_mass: torch.Tensor  # float32 [N] of the student's softmax over all its rows, beyond the vocabulary

    @classmethod
    def empty(cls, like: torch.Tensor, num_rows: int, *, num_scored: int) -> EvaluationRows:
        """To be filled, on the device of `like`."""
        return cls(
            kl=like.new_empty(num_scored, dtype=torch.float32),
            agree=like.new_empty(num_scored, dtype=torch.bool),
            student_logprob=like.new_zeros(num_rows, dtype=torch.float32),
            teacher_logprob=like.new_empty(num_scored, dtype=torch.float32),
            padding_mass=like.new_zeros(num_rows, dtype=torch.float32),
        )


@dataclass(frozen=True, slots=True)
class StudentHead:
    """The head of a student: its rows of the vocabulary, and those beyond it, where it has any."""

    inside: Head
    padding: Head | None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, shape: HeadShape, vocabulary_size: int) -> StudentHead:
        rest = None
        if (num_rows := weight.shape[0] - vocabulary_size) > 0:
            rest = Head(weight[vocabulary_size:], None if bias is None else bias[vocabulary_size:], shape, num_rows)
        return cls(Head(weight, bias, shape, vocabulary_size), rest)


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """What a teacher said of the rows."""

    hidden: torch.Tensor  # [N, H of the teacher]
    head: Head


@torch.no_grad()
def evaluation_rows(
    hidden: torch.Tensor,
    head: StudentHead,
    target_ids: torch.Tensor,
    teacher: TeacherStates | None,
    *,
    chunk_rows: int = 512,
) -> EvaluationRows:
    """Student hidden [N, H] against what the teacher said of the same rows, at temperature 1.

    Logits are computed in the dtype of each head and compared in float32; two [chunk_rows, V] tensors exist at a time.
    All columns but the last are of the distributions inside the vocabulary.
    """
    n = hidden.shape[0]
    rows = EvaluationRows.empty(hidden, n, num_scored=0 if teacher is None else n)
    for start in range(0, n, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, n))
        products = head.inside.product(hidden[chunk])
        of_teacher = None if teacher is None else teacher.head.product(teacher.hidden[chunk])
        padding = None if head.padding is None else head.padding.product(hidden[chunk])
        for block in cache_blocks(products):
            place = slice(start + block.start, start + block.stop)
            logits = head.inside.shape.apply(products[block].float())
            student = logits.log_softmax(1)
            rows.student_logprob[place] = student.gather(1, target_ids[place, None])[:, 0]
            if teacher is not None:
                scored = teacher.head.shape.apply(of_teacher[block].float()).log_softmax(1)
                _compare(rows, place, student, scored, target_ids[place, None])
            if padding is not None:
                inside = logits[:, 0] - student[:, 0]  # log-sum-exp
                outside = head.padding.shape.apply(padding[block].float()).logsumexp(1)
                rows.padding_mass[place] = (outside - inside).sigmoid()
    return rows


def _compare(
    rows: EvaluationRows, place: slice, student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor
) -> None:
    """Log-probabilities of the rows at `place`, float32 [n, V]."""
    rows.kl[place] = forward_kl(PairedLogProbs(student, teacher, exhaustive=True))
    rows.agree[place] = student.argmax(1) == teacher.argmax(1)
    rows.teacher_logprob[place] = teacher.gather(1, ids)[:, 0]


@dataclass(frozen=True, slots=True)
class EvaluationSums:
    """What ranks add up: float64 sums over rows."""

    num_rows: float
    num_scored: float  # rows that a teacher scored
    kl: float
    agree: float
    student_logprob: float
    teacher_logprob: float
    padding_mass: float

    @classmethod
    def of(cls, rows: EvaluationRows) -> EvaluationSums:
        columns = (getattr(rows, f.name) for f in fields(rows))  # the same names in the same order
        sums = (float(column.double().sum()) for column in columns)
        return cls(float(len(rows.student_logprob)), float(len(rows.kl)), *sums)

    @classmethod
    def combine(cls, parts: Iterable[EvaluationSums]) -> EvaluationSums:
        """The sums over all parts (micro-batches, ranks, tasks); zeros for none."""
        parts = list(parts)
        return cls(*(math.fsum(getattr(part, f.name) for part in parts) for f in fields(cls)))

    def result(self, step: int) -> Evaluation:
        """Means over all rows; those about a teacher over the rows that one scored, None where there is none. Raises
        `ValueError` where there is no row: a mean of nothing is no zero."""
        if not self.num_rows:
            raise ValueError("an evaluation needs at least one held-out loss row, got none")
        scored = self.num_scored
        return Evaluation(
            step=step,
            num_rows=int(self.num_rows),
            forward_kl=self.kl / scored if scored else None,
            agreement=self.agree / scored if scored else None,
            perplexity=_exp(-self.student_logprob / self.num_rows),
            teacher_perplexity=_exp(-self.teacher_logprob / scored) if scored else None,
            padding_mass=self.padding_mass / self.num_rows,
        )


def _exp(nats: float) -> float:
    """exp that answers inf where Python raises: an untrained or diverged student may be that bad."""
    return math.exp(nats) if nats < 700 else math.inf
