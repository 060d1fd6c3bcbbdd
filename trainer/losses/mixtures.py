"""Divergences from a mixture of teacher and student (kl.py says what all divergences share)."""

from __future__ import annotations

import torch

from configs.losses import Jsd, SkewForwardKl, SkewReverseKl, Taid
from trainer.labels.encoding import ABSENT
from trainer.losses.terms import computes
from trainer.losses.with_gradient import with_gradient
from trainer.types import PairedLogProbs


@computes(Jsd)
def jsd(pair: PairedLogProbs, *, beta: float, normalised: bool = False) -> torch.Tensor:
    """beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q, [N]; at most the entropy of (beta, 1 - beta).
    Gradient (1 - beta) q (log q/m - KL(q, m)).

    GKD, arXiv 2306.13649, equation 1. jsd / beta -> forward_kl as beta -> 0, jsd / (1 - beta) -> reverse_kl as beta ->
    1; `normalised` divides by beta (1 - beta), so that both ends have the size of a KL.
    """
    student, teacher = pair.student.detach(), pair.teacher.clamp(min=ABSENT)
    p, q = teacher.exp(), student.exp()
    log_m = _log_mixture(p, q, beta)
    scale = 1.0 / (beta * (1.0 - beta)) if normalised else 1.0
    to_student = (student - log_m).mul_(q)
    values = beta * (p.mul_(teacher.sub_(log_m))).sum(-1) + (1.0 - beta) * to_student.sum(-1)
    return with_gradient(values * scale, (pair.student, lambda: to_student.mul_((1.0 - beta) * scale)))


@computes(SkewForwardKl)
def skew_forward_kl(pair: PairedLogProbs, *, alpha: float) -> torch.Tensor:
    """KL(p, m) with m = alpha p + (1 - alpha) q, [N]; at most -log alpha; gradient (1 - alpha) q (E_q[p/m] - p/m).

    DistiLLM, arXiv 2402.03898, equation 5; -> forward_kl as alpha -> 0.
    """
    student, teacher = pair.student.detach(), pair.teacher.clamp(min=ABSENT)
    p, q = teacher.exp(), student.exp()
    m = torch.lerp(q, p, alpha)
    values = (teacher.sub_(_log(m)).mul_(p)).sum(-1)
    return with_gradient(values, (pair.student, lambda: q.mul_(p).mul_(alpha - 1.0).div_(_positive(m))))


@computes(SkewReverseKl)
def skew_reverse_kl(pair: PairedLogProbs, *, alpha: float) -> torch.Tensor:
    """KL(q, m) with m = alpha q + (1 - alpha) p, [N]; at most -log alpha; gradient q (h - E_q[h]) with h = log q/m -
    alpha q/m.

    DistiLLM, arXiv 2402.03898, equation 6; -> reverse_kl as alpha -> 0.
    """
    student, teacher = pair.student.detach(), pair.teacher.clamp(min=ABSENT)
    p, q = teacher.exp_(), student.exp()
    m = torch.lerp(p, q, alpha)
    parts = (student - _log(m)).mul_(q)
    values = parts.sum(-1)

    def gradient() -> torch.Tensor:
        return parts.add_(q).sub_(q.square().mul_(alpha).div_(_positive(m)))

    return with_gradient(values, (pair.student, gradient))


@computes(Taid)
def taid(pair: PairedLogProbs, *, t: float) -> torch.Tensor:
    """KL(m, q) with m ~ q^(1 - t) p^t, that is, with logits (1 - t) of the student + t of the teacher, [N]; m carries
    no gradient, so that it is q - m. At t = 1 forward_kl.

    TAID, arXiv 2501.16937, equation 3; log-probabilities differ from logits by a constant of the row, which the softmax
    forgets. t comes from the term's schedule.
    """
    student = pair.student.detach()
    log_m = torch.lerp(student, pair.teacher.clamp(min=ABSENT), t).log_softmax(-1)
    m = log_m.exp()
    values = log_m.sub_(student).mul_(m).sum(-1)
    return with_gradient(values, (pair.student, m.neg_))


def _log_mixture(p: torch.Tensor, q: torch.Tensor, weight: float) -> torch.Tensor:
    """log of weight p + (1 - weight) q."""
    return _log(torch.lerp(q, p, weight))


def _log(m: torch.Tensor) -> torch.Tensor:
    """The logarithm where m is a number, that of the smallest one where it underflows: there p and q are 0 too, or
    below what a sum over the vocabulary can see, and so is all that is multiplied by them. Where m does not underflow
    its relative error is that of the sum, and no log-sum-exp would do better."""
    return _positive(m).log()


def _positive(m: torch.Tensor) -> torch.Tensor:
    return m.clamp(min=torch.finfo(m.dtype).tiny)
