"""Distances of p and q that are no KL divergence (kl.py says what all divergences share)."""

from __future__ import annotations

import torch

from configs.losses import AlphaBeta, Tvd
from trainer.labels.encoding import ABSENT
from trainer.losses.terms import computes
from trainer.losses.with_gradient import with_gradient
from trainer.types import PairedLogProbs


@computes(Tvd)
def tvd(pair: PairedLogProbs) -> torch.Tensor:
    """sum |p - q| / 2, [N], between 0 and 1; gradient q (s - E_q[s]) / 2 with s = sign(q - p), at most 1/2 in sum.

    f-distill, arXiv 2307.15190, table 1, per token. Not smooth where p = q.
    """
    q = pair.student.detach().exp()
    difference = q - pair.teacher.exp()
    values = difference.abs().sum(-1) / 2
    return with_gradient(values, (pair.student, lambda: difference.sign_().mul_(q).mul_(0.5)))


@computes(AlphaBeta)
def alpha_beta(pair: PairedLogProbs, *, alpha: float, beta: float) -> torch.Tensor:
    """-sum (p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)) / (a b), [N]; gradient by log q: q^b (q^a - p^a) /
    a.

    ABKD, arXiv 2505.04560, equation 5; forward_kl at (1, 0), reverse_kl at (0, 1), 2 sum (sqrt p - sqrt q)^2 at
    (1/2, 1/2).
    """
    student, teacher = pair.student.detach(), pair.teacher.clamp(min=ABSENT)
    p_a, q_b, total = (alpha * teacher).exp_(), (beta * student).exp_(), alpha + beta
    gap = (alpha * student).exp_().sub_(p_a)  # q^a - p^a, the difference that both value and gradient are made of
    of_p = teacher.mul_(beta).exp_().sub_(q_b).mul_(p_a).sum(-1)  # sum p^a (p^b - q^b)
    parts = gap.mul_(q_b)
    values = (of_p / beta + parts.sum(-1) / alpha) / total
    return with_gradient(values, (pair.student, lambda: parts.div_(alpha)))
