"""Distances between states inside the student and inside the teacher, which knows neither layers nor projectors.

The survey's table 2 (arXiv 2402.13116) writes them as norms of Phi_S h_S - Phi_T h_T. Here Phi_T is the identity: a map
of the teacher's states that is learnt could make them equal to the student's by forgetting them.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from configs.losses import Features
from trainer.losses.terms import computes

MOST_COMPARED = 512
"""Rows of a micro-batch that mmd looks at, evenly spread: it compares each with each."""

_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the kernels that mmd adds up, as multiples of the median distance."""

_SMALLEST = 1e-6  # of a mean square that a state is divided by


@computes(Features)
def features(
    student: torch.Tensor, teacher: torch.Tensor, *, distance: str, normalised: bool, temperature: float
) -> torch.Tensor:
    """[n] of states [n, H] of both models at the same rows, computed in float32 at least; only `student` has a
    gradient. mmd is one number of all rows, which each of them has."""
    student, teacher = (states.float() if states.itemsize < 4 else states for states in (student, teacher.detach()))
    if normalised:
        student, teacher = _normalised(student), _normalised(teacher)
    match distance:
        case "l2":
            return (student - teacher).square().mean(-1)
        case "l1":
            return (student - teacher).abs().mean(-1)
        case "cosine":
            return 1 - functional.cosine_similarity(student, teacher, dim=-1)
        case "ce":
            target = (teacher / temperature).softmax(-1)
            return -(target * (student / temperature).log_softmax(-1)).sum(-1)
    assert distance == "mmd", distance
    return mmd(student, teacher).expand(len(student))


def _normalised(states: torch.Tensor) -> torch.Tensor:
    """Of mean square 1, [n, H]."""
    return states * (states.square().mean(-1, keepdim=True) + _SMALLEST).rsqrt()


def mmd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The squared maximum mean discrepancy of two sets of states [n, H] and [n, H], []: 0 of fewer than two rows.

    The U-statistic of Gretton et al., JMLR 13 (2012), equation 4: the mean over i != j of k(s_i, s_j) + k(t_i, t_j) -
    k(s_i, t_j) - k(s_j, t_i). It is unbiased, so that it may be slightly below 0, and exactly 0 of equal states. k is a
    mean of Gaussian kernels exp(-d^2 / b) with b the median of d^2 among all states times 1/4 to 4, a constant.
    """
    rows = _spread(len(student), student.device)
    student, teacher = student[rows], teacher[rows]
    n = len(student)
    if n < 2:
        return student.sum() * 0.0
    both = torch.cat([student, teacher])
    squares = both.square().sum(1)
    distances = (squares[:, None] + squares - 2 * both @ both.T).clamp(min=0)
    apart = ~torch.eye(2 * n, dtype=torch.bool, device=both.device)
    median = distances.detach()[apart].median().clamp(min=torch.finfo(distances.dtype).tiny)
    kernel = sum((distances / (-median * factor)).exp() for factor in _BANDWIDTHS) / len(_BANDWIDTHS)
    signs = torch.ones(n, device=both.device, dtype=both.dtype)
    signs = torch.cat([signs, -signs])
    blocks = apart[:n, :n].repeat(2, 2)  # without s_i and t_i of one row as well, as the statistic has it
    return (kernel * signs[:, None] * signs * blocks).sum() / (n * (n - 1))


def _spread(num_rows: int, device: torch.device) -> torch.Tensor:
    """At most `MOST_COMPARED` of so many rows."""
    count = min(num_rows, MOST_COMPARED)
    return torch.arange(count, device=device) * num_rows // max(1, count)
