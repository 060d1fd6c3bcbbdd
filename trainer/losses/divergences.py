"""Per-row distances between student and teacher, each a function of a pair of log-probabilities and of nothing else.

One file, because each is ten lines: whatever the encoding of the labels, a divergence sees two distributions over the
same events. p is the teacher, q the student; rows come back unreduced, in nats. On a pair that is not exhaustive (kept
ids and one lumped tail) each value is a lower bound of the one over the vocabulary (data processing inequality), and
the gradient at the kept ids is still exact for forward_kl.

A teacher event of probability zero may be given as -inf: it counts as exp(ABSENT), so that nothing becomes 0 * inf.
Student events must be finite, as a log-softmax of finite logits is.
"""

from __future__ import annotations

import math

import torch

from configs.losses import ForwardKl, Jsd, ReverseKl, SkewForwardKl
from trainer.labels.encoding import ABSENT
from trainer.losses.terms import computes
from trainer.types import PairedLogProbs


@computes(ForwardKl)
def forward_kl(pair: PairedLogProbs) -> torch.Tensor:
    """KL(teacher, student) = sum p (log p - log q), [N]; gradient by the student logits q - p.

    Hinton et al., arXiv 1503.02531; covers all modes of the teacher.
    """
    teacher = pair.teacher.clamp(min=ABSENT)
    return (teacher.exp() * (teacher - pair.student)).sum(-1)


@computes(ReverseKl)
def reverse_kl(pair: PairedLogProbs) -> torch.Tensor:
    """KL(student, teacher) = sum q (log q - log p), [N]; gradient q (log q/p - KL).

    MiniLLM, arXiv 2306.08543, equation 1, per token; seeks modes.
    """
    teacher = pair.teacher.clamp(min=ABSENT)
    return (pair.student.exp() * (pair.student - teacher)).sum(-1)


@computes(Jsd)
def jsd(pair: PairedLogProbs, *, beta: float) -> torch.Tensor:
    """beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q, [N]; at most the entropy of (beta, 1 - beta).

    GKD, arXiv 2306.13649, equation 1. jsd / beta -> forward_kl as beta -> 0, jsd / (1 - beta) -> reverse_kl as beta ->
    1. The mixture is formed in log space: log(beta p + (1 - beta) q) underflows.
    """
    teacher = pair.teacher.clamp(min=ABSENT)
    mixture = torch.logaddexp(teacher + math.log(beta), pair.student + math.log1p(-beta))
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    to_student = (pair.student.exp() * (pair.student - mixture)).sum(-1)
    return beta * to_teacher + (1.0 - beta) * to_student


@computes(SkewForwardKl)
def skew_forward_kl(pair: PairedLogProbs, *, alpha: float) -> torch.Tensor:
    """KL(p, m) with m = alpha p + (1 - alpha) q, [N]; at most -log alpha; gradient (1 - alpha) q (E_q[p/m] - p/m).

    DistiLLM, arXiv 2402.03898, equation 5; -> forward_kl as alpha -> 0.
    """
    teacher = pair.teacher.clamp(min=ABSENT)
    mixture = torch.logaddexp(teacher + math.log(alpha), pair.student + math.log1p(-alpha))
    return (teacher.exp() * (teacher - mixture)).sum(-1)
