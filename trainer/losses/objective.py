"""The weighted sum of terms that a student minimises, and the only file that adds rows of different terms together.

    loss[row] = sum over divergences  weight * T^2 * D(pair at temperature T)[row]
              + weight * (-log q(next token))[row]  for cross_entropy, always at T = 1
              + (sum of the weights) * (-log(1 - mass on padding))[row]  for a head with rows beyond the vocabulary

T^2 keeps the size of the gradient when the temperature changes (Hinton et al., arXiv 1503.02531, section 2). Rows are
summed by `trainer/losses/fused.py` and divided by the *global* number of loss tokens of the step by whoever calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from trainer.labels.encoding import Encoding
from trainer.losses.divergences import DIVERGENCES
from trainer.losses.padding import padding_nats
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from configs.losses import Term
    from trainer.model.head import Head

CROSS_ENTROPY = "cross_entropy"
PADDING = "padding"


@dataclass(frozen=True, slots=True)
class WeightedTerm:
    """One term with everything that multiplies it. `divergence` is None for cross_entropy."""

    name: str
    factor: float
    divergence: Callable[[PairedLogProbs], torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Objective:
    """The terms in the order of the config; `padding_weight` is that of `trainer/losses/padding.py`, 0 where the
    student's head has no rows beyond the vocabulary."""

    terms: tuple[WeightedTerm, ...]
    padding_weight: float = 0.0

    @classmethod
    def of(cls, terms: AbstractSequence[Term], encoding: Encoding, *, padded: bool = False) -> Objective:
        """The objective of a config for labels of this encoding (its temperature sets T^2). A loss named twice (jsd at
        two betas) gets a number: `jsd`, `jsd_2`. `padded`: the student's head has rows beyond the vocabulary."""
        weighted: list[WeightedTerm] = []
        for position, term in enumerate(terms):
            nth = 1 + sum(earlier.loss == term.loss for earlier in terms[:position])
            name = term.loss if nth == 1 else f"{term.loss}_{nth}"
            if term.loss == CROSS_ENTROPY:
                weighted.append(WeightedTerm(name, term.weight, None))
                continue
            divergence = partial(DIVERGENCES[term.loss], **term.parameters())
            weighted.append(WeightedTerm(name, term.weight * encoding.temperature**2, divergence))
        return cls(tuple(weighted), math.fsum(term.weight for term in terms) if padded else 0.0)

    @property
    def names(self) -> tuple[str, ...]:
        return (*(term.name for term in self.terms), *((PADDING,) if self.padding_weight else ()))

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
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss [n] with gradient, {term name: [n] detached}) of student logits [n, V].

        The values of the terms are bare: nats, at the encoding's temperature, without weight or T^2. `labels` are the
        encoding's columns or what its `ready` made of them. `padding` [n, P] are the student's logits beyond the
        vocabulary, with gradient, where the objective has a term for them; None there: they count as absent.
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
        if self.padding_weight:
            value = logits.new_zeros(logits.shape[0]) if padding is None else padding_nats(logits, padding)
            values[PADDING] = value.detach()
            loss = loss + value * self.padding_weight
        return loss, values
