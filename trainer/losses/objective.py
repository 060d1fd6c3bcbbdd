"""The weighted sum of terms that a student minimises, and the only file that adds rows of different terms together.

    loss[row] = sum over divergences  weight * T^2 * D(pair at temperature T)[row]
              + weight * (-log q(next token))[row]  for cross_entropy, always at T = 1

T^2 keeps the size of the gradient when the temperature changes (Hinton et al., arXiv 1503.02531, section 2). Rows are
summed by `trainer/losses/fused.py` and divided by the *global* number of loss tokens of the step by whoever calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from trainer.labels.encoding import Encoding
from trainer.losses.divergences import DIVERGENCES
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from configs.schema import Term
    from trainer.heads import Head

CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True, slots=True)
class WeightedTerm:
    """One term with everything that multiplies it. `divergence` is None for cross_entropy."""

    name: str
    factor: float
    divergence: Callable[[PairedLogProbs], torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Objective:
    """The terms in the order of the config."""

    terms: tuple[WeightedTerm, ...]

    @classmethod
    def of(cls, terms: AbstractSequence[Term], encoding: Encoding) -> Objective:
        """The objective of a config for labels of this encoding (its temperature sets T^2). A loss named twice (jsd at
        two betas) gets a number: `jsd`, `jsd_2`."""
        weighted: list[WeightedTerm] = []
        for position, term in enumerate(terms):
            nth = 1 + sum(earlier.loss == term.loss for earlier in terms[:position])
            name = term.loss if nth == 1 else f"{term.loss}_{nth}"
            if term.loss == CROSS_ENTROPY:
                weighted.append(WeightedTerm(name, term.weight, None))
                continue
            divergence = DIVERGENCES[term.loss]
            if term.beta is not None:
                divergence = partial(divergence, beta=term.beta)
            weighted.append(WeightedTerm(name, term.weight * encoding.temperature**2, divergence))
        return cls(tuple(weighted))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    @property
    def needs_labels(self) -> bool:
        """False for cross_entropy alone: the teacher's labels are then never looked at."""
        return any(term.divergence is not None for term in self.terms)

    def rows(
        self,
        logits: torch.Tensor,
        labels: Mapping[str, torch.Tensor],
        next_ids: torch.Tensor,
        encoding: Encoding,
        teacher_head: Head | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss [n] with gradient, {term name: [n] detached}) of student logits [n, V].

        The values of the terms are bare: nats, at the encoding's temperature, without weight or T^2. `labels` are the
        encoding's columns or what its `ready` made of them.
        """
        pair = encoding.pair(logits, labels, teacher_head) if self.needs_labels else None
        loss, values = None, {}
        for term in self.terms:
            if term.divergence is None:
                value = functional.cross_entropy(logits, next_ids, reduction="none")
            else:
                value = term.divergence(pair)
            values[term.name] = value.detach()
            loss = value * term.factor if loss is None else loss + value * term.factor
        return loss, values
