"""Terms that compare whole answers to one prompt."""

from __future__ import annotations

import torch
from torch.nn import functional

from configs.losses import Dpo
from trainer.losses.terms import SequenceScores, computes


@computes(Dpo)
def dpo(scores: SequenceScores, *, beta: float) -> torch.Tensor:
    """-log sigmoid(beta ((log q - log r)(chosen) - (log q - log r)(rejected))), [G]; sample 0 of a group is chosen,
    sample 1 rejected, q the student, r the reference.

    Rafailov et al., arXiv 2305.18290, equation 7. log 2 where the student is the reference; gradient by log q(chosen)
    -beta sigmoid(-margin), by log q(rejected) its opposite.
    """
    assert scores.reference is not None, "dpo needs the reference's log-probabilities"
    if other := [group for group in scores.groups if len(group) != 2]:
        raise ValueError(f"dpo compares two answers to a prompt, a group has {len(other[0])}")
    chosen, rejected = torch.tensor(scores.groups, device=scores.student.device).unbind(1)
    ratios = scores.student - scores.reference
    return -functional.logsigmoid(beta * (ratios[chosen] - ratios[rejected]))
