"""KL divergences of rows and what is made of them.

In all files of divergences p is the teacher, q the student; each is a function of a pair of log-probabilities over the
same events, whatever the encoding of the labels; rows come back unreduced, in nats. On a pair that is not exhaustive
(kept ids and one lumped tail) an f-divergence is a lower bound of the one over the vocabulary (data processing
inequality), and the gradient at the kept ids is still exact for forward_kl.

A teacher event of probability zero may be given as -inf: it counts as exp(ABSENT), so that nothing becomes 0 * inf.
Student events must be finite, as a log-softmax of finite logits is. Gradients are given in closed form, by log q.
"""

from __future__ import annotations

import torch

from configs.losses import AdaptiveKl, ForwardKl, Lsm, ReverseKl
from trainer.labels.encoding import ABSENT
from trainer.losses.terms import computes
from trainer.losses.with_gradient import with_gradient
from trainer.model.fast import top_k
from trainer.types import PairedLogProbs


@computes(ForwardKl)
def forward_kl(pair: PairedLogProbs) -> torch.Tensor:
    """KL(teacher, student) = sum p (log p - log q), [N]; gradient by the student logits q - p.

    Hinton et al., arXiv 1503.02531; covers all modes of the teacher. Where p is an unbiased estimate, so is the value:
    the entropy is then the teacher's own, and the rest is linear in p.
    """
    student, teacher = pair.student.detach(), pair.teacher.clamp(min=ABSENT)
    p = teacher.exp()
    if pair.teacher_entropy is None:
        values = (teacher.sub_(student).mul_(p)).sum(-1)
    else:
        values = -(p * student).sum(-1) - pair.teacher_entropy
    return with_gradient(values, (pair.student, p.neg_))


@computes(ReverseKl)
def reverse_kl(pair: PairedLogProbs) -> torch.Tensor:
    """KL(student, teacher) = sum q (log q - log p), [N]; gradient q (log q/p - KL).

    MiniLLM, arXiv 2306.08543, equation 1, per token; seeks modes.
    """
    student, teacher = pair.student.detach(), pair.teacher.clamp(min=ABSENT)
    q = student.exp()
    parts = teacher.neg_().add_(student).mul_(q)
    return with_gradient(parts.sum(-1), (pair.student, lambda: parts.add_(q)))


@computes(AdaptiveKl)
def adaptive_kl(pair: PairedLogProbs, *, head_mass: float) -> torch.Tensor:
    """w KL(teacher, student) + (1 - w) KL(student, teacher), [N]; w is the share of sum |p - q| that lies in the head,
    and carries no gradient.

    AKL, arXiv 2404.02657, with the head of its authors' code: the likeliest ids while their probabilities sum to no
    more than `head_mass`, the first one always. A lumped tail is no part of the head.
    """
    student, teacher = pair.student.detach(), pair.teacher.clamp(min=ABSENT)
    p, q = teacher.exp(), student.exp()
    gap = (p - q).abs_()
    ids, inside = _head(p if pair.exhaustive else p[:, :-1], head_mass)
    in_head = (gap.gather(1, ids) * inside).sum(-1, keepdim=True)
    share = in_head / gap.sum(-1, keepdim=True).clamp_(min=torch.finfo(gap.dtype).tiny)
    log_ratio = teacher.neg_().add_(student)
    forward, reverse = -(p * log_ratio).sum(-1), (log_ratio.mul_(q)).sum(-1)
    values = torch.lerp(reverse, forward, share[:, 0])
    return with_gradient(values, (pair.student, lambda: log_ratio.add_(q).mul_(1.0 - share).sub_(p.mul_(share))))


@computes(Lsm)
def lsm(pair: PairedLogProbs, *, k: int) -> torch.Tensor:
    """KL(student, teacher) over the teacher's k likeliest ids, both renormalised there, [N]; gradient r (log r/s - KL)
    at these ids, with r and s the two renormalised, exactly 0 at all others. LSM, arXiv 2603.25562."""
    assert pair.student_scores is not None, "lsm needs what the student's log-probabilities are the log-softmax of"
    single = pair.teacher if pair.exhaustive else pair.teacher[:, :-1]
    log_s, ids = top_k(single, min(k, single.shape[1]))
    log_s = log_s.clamp(min=ABSENT).log_softmax(-1)
    log_r = pair.student_scores.gather(1, ids).log_softmax(-1)
    return (log_r.exp() * (log_r - log_s)).sum(-1)


def _head(p: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [n, k], bool [n, k] which of them are in it): the likeliest events of p [n, E] whose cumulated
    probability does not exceed a mass. A few are enough for nearly every row, and sorting all V costs more than the
    loss.
    """
    k = min(32, p.shape[1])
    while True:
        values, ids = top_k(p, k)
        inside = values.cumsum(1) <= mass
        inside[:, 0] = True
        if k == p.shape[1] or not bool(inside[:, -1].any()):
            return ids, inside
        k = min(8 * k, p.shape[1])
