"""A term of a user's own: a part of KL(teacher, student)."""

from __future__ import annotations

import torch

from configs.losses import Divergence
from trainer.losses.terms import computes
from trainer.types import PairedLogProbs


class Term(Divergence):
    part: float = 0.5


@computes(Term)
def half_kl(pair: PairedLogProbs, *, part: float) -> torch.Tensor:
    return part * (pair.teacher.exp() * (pair.teacher - pair.student)).sum(-1)
