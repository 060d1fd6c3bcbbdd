"""Terms for teachers with another tokenizer than the student's (`configs/alignment.py`)."""

from __future__ import annotations

import torch

from configs.losses import ChunkKl, Uld
from trainer.losses.terms import SequenceScores, computes
from trainer.types import PairedLogProbs

MOST = -1e-7
"""Log of the largest probability of a chunk: 1 - P of what is certain must have a logarithm."""


@computes(ChunkKl)
def chunk_kl(scores: SequenceScores) -> torch.Tensor:
    """P log P/Q + (1 - P) log (1 - P)/(1 - Q), [C]; P and Q are the probabilities of a chunk by teacher and student,
    products over its tokens. Gradient by log Q (Q - P)/(1 - Q).

    ALM, arXiv 2503.20083, with the KL divergence and tau = 1. A lower bound of the KL between the distributions over
    all texts of the chunk's length (data processing inequality). The last sum is of rows in no chunk.
    """
    assert scores.reference is not None, "chunk_kl needs the teacher's log-probabilities"
    p, q = (sums[: len(scores.groups)].clamp(max=MOST) for sums in (scores.reference, scores.student))
    return p.exp() * (p - q) - torch.expm1(p) * (_log1mexp(p) - _log1mexp(q))


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
