"""Terms for teachers with another tokenizer than the student's (`configs/alignment.py`)."""

from __future__ import annotations

import torch

from configs.losses import ChunkKl, Uld
from trainer.losses.terms import SequenceScores, computes
from trainer.types import PairedLogProbs

MOST = -1e-7
"""Log of the largest probability of a chunk: 1 - P of what is certain must have a logarithm."""


@computes(ChunkKl)
def chunk_kl(scores: SequenceScores, *, temperature: float) -> torch.Tensor:
    """tau (P log P/Q + (1 - P) log (1 - P)/(1 - Q)), [C]; P and Q are the probabilities of a chunk by teacher and
    student, products over its tokens, to the power of 1/tau. Gradient by the student's log-probability
    (Q - P)/(1 - Q).

    ALM, arXiv 2503.20083, with the KL divergence, here times tau, so that it does not vanish with a large one. At
    tau = 1 a lower bound of the KL between the distributions over all texts of the chunk's length (data processing
    inequality), whose gradient is no larger than Q, so that an unlikely chunk hardly counts. At a large tau the
    gradient is 1 - log P / log Q of the untempered ones: every chunk shall be as likely as the teacher says. The last
    sum is of rows in no chunk.
    """
    assert scores.reference is not None, "chunk_kl needs the teacher's log-probabilities"
    sums = (one[: len(scores.groups)].double() for one in (scores.reference, scores.student))
    p, q = ((one / temperature).clamp(max=MOST) for one in sums)
    return (temperature * (p.exp() * (p - q) - torch.expm1(p) * (_log1mexp(p) - _log1mexp(q)))).to(scores.student.dtype)


@computes(Uld)
def uld(pair: PairedLogProbs) -> torch.Tensor:
    """sum_i |p_(i) - q_(i)| over the probabilities of each side in descending order, [N]; between 0 and 2.

    Universal logit distillation, arXiv 2402.12030, equation 5. Gradient by a student's probability the sign of the
    difference at its place; it does not care which token has which.
    """
    teacher, student = (side.exp().sort(dim=1, descending=True).values for side in (pair.teacher, pair.student))
    return (student - teacher).abs().sum(1)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends."""
    return torch.where(x > -0.6931, (-torch.expm1(x)).log(), (-x.exp()).log1p())
