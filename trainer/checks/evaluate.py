"""The row mathematics of an evaluation: exact, over the full vocabulary, whatever the labels of the training are.

One file for the rows of a rank and for adding ranks up, so that what is reported as KL is never a top-k bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

from trainer.losses.divergences import forward_kl
from trainer.model.fast import cache_blocks
from trainer.model.head import Head, HeadShape
from trainer.types import Evaluation, PairedLogProbs, SampleTokens


@dataclass(frozen=True, slots=True)
class EvaluationRows:
    """Per loss row, on the device; log-probabilities of the realised next token."""

    kl: torch.Tensor  # float32 [N] KL(teacher, student) in nats
    agree: torch.Tensor  # bool [N] both argmax are equal
    student_logprob: torch.Tensor  # float32 [N]
    teacher_logprob: torch.Tensor  # float32 [N]
    padding_mass: torch.Tensor  # float32 [N] of the student's softmax over all its rows, beyond the vocabulary


@torch.no_grad()
def evaluation_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    head_shape: HeadShape,
    vocabulary_size: int,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    next_ids: torch.Tensor,
    chunk_rows: int = 512,
) -> EvaluationRows:
    """Student hidden [N, H] and head against teacher hidden [N, H of the teacher] and head, at temperature 1.

    Logits are computed in the dtype of each head and compared in float32; two [chunk_rows, V] tensors exist at a time.
    All columns but the last are of the distributions inside the vocabulary.
    """
    student_head = Head(weight, bias, head_shape, vocabulary_size)
    padding_head = _padding(weight, bias, head_shape, vocabulary_size)
    n = hidden.shape[0]
    rows = EvaluationRows(
        kl=hidden.new_empty(n, dtype=torch.float32),
        agree=hidden.new_empty(n, dtype=torch.bool),
        student_logprob=hidden.new_empty(n, dtype=torch.float32),
        teacher_logprob=hidden.new_empty(n, dtype=torch.float32),
        padding_mass=hidden.new_zeros(n, dtype=torch.float32),
    )
    for start in range(0, n, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, n))
        student, teacher = student_head.product(hidden[chunk]), teacher_head.product(teacher_hidden[chunk])
        padding = None if padding_head is None else padding_head.product(hidden[chunk])
        for block in cache_blocks(student):
            logits = head_shape.apply(student[block].float())
            s = logits.log_softmax(1)
            t = teacher_head.shape.apply(teacher[block].float()).log_softmax(1)
            place = slice(start + block.start, start + block.stop)
            ids = next_ids[place, None]
            rows.kl[place] = forward_kl(PairedLogProbs(s, t, exhaustive=True))
            rows.agree[place] = s.argmax(1) == t.argmax(1)
            rows.student_logprob[place] = s.gather(1, ids)[:, 0]
            rows.teacher_logprob[place] = t.gather(1, ids)[:, 0]
            if padding is not None:
                inside = logits[:, 0] - s[:, 0]  # log-sum-exp
                outside = head_shape.apply(padding[block].float()).logsumexp(1)
                rows.padding_mass[place] = (outside - inside).sigmoid()
    return rows


def _padding(weight: torch.Tensor, bias: torch.Tensor | None, shape: HeadShape, vocabulary_size: int) -> Head | None:
    """The rows of a head beyond the vocabulary."""
    num_rows = weight.shape[0] - vocabulary_size
    if num_rows <= 0:
        return None
    return Head(weight[vocabulary_size:], None if bias is None else bias[vocabulary_size:], shape, num_rows)


@dataclass(frozen=True, slots=True)
class EvaluationSums:
    """What ranks add up: float64 sums over rows."""

    num_rows: float
    kl: float
    agree: float
    student_logprob: float
    teacher_logprob: float
    padding_mass: float

    @classmethod
    def of(cls, rows: EvaluationRows) -> EvaluationSums:
        columns = (getattr(rows, f.name) for f in fields(rows))  # the same names in the same order
        return cls(float(rows.kl.shape[0]), *(float(column.double().sum()) for column in columns))

    @classmethod
    def combine(cls, parts: Iterable[EvaluationSums]) -> EvaluationSums:
        """The sums over all parts (micro-batches, ranks); zeros for none."""
        parts = list(parts)
        return cls(*(math.fsum(getattr(part, f.name) for part in parts) for f in fields(cls)))

    def to_tensor(self, device: torch.device) -> torch.Tensor:
        """float64 [6], for an all-reduce by sum; `from_tensor` reads it back."""
        return torch.tensor([getattr(self, f.name) for f in fields(self)], dtype=torch.float64, device=device)

    @classmethod
    def from_tensor(cls, sums: torch.Tensor) -> EvaluationSums:
        return cls(*sums.tolist())

    def result(self, step: int, samples: tuple[SampleTokens, ...] = ()) -> Evaluation:
        """Means over all rows. Raises `ValueError` where there is no row: a mean of nothing is no zero."""
        if not self.num_rows:
            raise ValueError("an evaluation needs at least one held-out loss row, got none")
        return Evaluation(
            step=step,
            num_rows=int(self.num_rows),
            forward_kl=self.kl / self.num_rows,
            agreement=self.agree / self.num_rows,
            perplexity=_exp(-self.student_logprob / self.num_rows),
            teacher_perplexity=_exp(-self.teacher_logprob / self.num_rows),
            padding_mass=self.padding_mass / self.num_rows,
            samples=samples,
        )


def _exp(nats: float) -> float:
    """exp that answers inf where Python raises: an untrained or diverged student may be that bad."""
    return math.exp(nats) if nats < 700 else math.inf
