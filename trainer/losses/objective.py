"""The weighted sum of terms that a student minimises, and the only file that adds rows of different terms together.

    loss[row] = sum over divergences  weight * T^2 * D(pair at temperature T)[row]
              + weight * (-log q(target id))[row]  for cross_entropy, always at T = 1
              + (sum of the weights) * (-log(1 - mass on padding))[row]  for a head with rows beyond the vocabulary

T^2 keeps the size of the gradient when the temperature changes (Hinton et al., arXiv 1503.02531, section 2). Rows are
summed by `trainer/losses/fused.py`, times the rows' own weights, and divided by the *global* number of loss tokens of
the step by whoever calls it.

Sequence terms are functions of whole answers. `fused.py` asks for their value and their gradient by the rows'
log-probabilities before it goes through the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from configs.losses import CrossEntropy
from trainer.labels.encoding import Encoding
from trainer.losses import distances, kl, mixtures, preference  # noqa: F401 - their terms are registered when imported
from trainer.losses.ensemble import WEIGHT, Together, pairs_of
from trainer.losses.padding import padding_nats
from trainer.losses.schedules import VALUE
from trainer.losses.target import TargetEvent
from trainer.losses.terms import Schedule, SequenceScores, check_complete, computes, function_of, schedule_of
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from configs.losses import Term
    from trainer.model.head import Head

PADDING = "padding"


@computes(CrossEntropy)
def cross_entropy(logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """-log q(target id), [N] from logits [N, V]."""
    return functional.cross_entropy(logits, target_ids, reduction="none")


check_complete()


@dataclass(frozen=True, slots=True)
class WeightedTerm:
    """One term with everything that multiplies it; `function` has its parameters bound, those of a schedule
    excepted."""

    name: str
    factor: float
    function: Callable[..., Any]
    needs_labels: bool = False
    needs_target: bool = False
    tells: tuple[str, ...] = ()
    schedule: Schedule | None = None
    teacher: str = ""  # of several with terms of their own: its name

    def rows(
        self, pair: PairedLogProbs | None, target: TargetEvent | None, logits: torch.Tensor, target_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """([n] with gradient, what it tells of these rows)."""
        given = ((pair, target) if self.needs_target else (pair,)) if self.needs_labels else (logits, target_ids)
        arguments = {} if self.schedule is None else self.schedule.arguments()
        found = self.function(*given, **arguments)
        return found if self.tells else (found, {})


@dataclass(frozen=True, slots=True)
class Objective:
    """The terms in the order of the config; `padding_weight` is that of `trainer/losses/padding.py`, 0 where the
    student's head has no rows beyond the vocabulary."""

    row_terms: tuple[WeightedTerm, ...]
    sequence_terms: tuple[WeightedTerm, ...] = ()
    padding_weight: float = 0.0
    needs_reference: bool = False  # of target ids, by a sequence term

    @classmethod
    def of(
        cls,
        terms: AbstractSequence[Term],
        encoding: Encoding | None,
        *,
        padded: bool = False,
        teachers: AbstractSequence[str] = (),
    ) -> Objective:
        """The objective of a config for labels of this encoding (its temperature sets T^2), None without labels. A loss
        named twice (jsd at two betas) gets a number: `jsd`, `jsd_2`. `padded`: the student's head has rows beyond the
        vocabulary. `teachers`: each has terms of its own, `forward_kl/<teacher>`, where they look at labels."""
        weighted: dict[str, list[WeightedTerm]] = {"row": [], "sequence": []}
        for position, term in enumerate(terms):
            nth = 1 + sum(earlier.loss == term.loss for earlier in terms[:position])
            needs_labels, schedule = "labels" in term.needs, schedule_of(term)
            assert encoding is not None or not term.needs & {"labels", "target_logprobs"}, term
            one = WeightedTerm(
                name=term.loss if nth == 1 else f"{term.loss}_{nth}",
                factor=term.weight * encoding.temperature**2 if needs_labels else term.weight,
                function=function_of(term) if schedule else partial(function_of(term), **term.parameters()),
                needs_labels=needs_labels,
                needs_target="target_event" in term.needs,
                tells=term.tells,
                schedule=schedule,
            )
            of_each = [replace(one, name=f"{one.name}/{teacher}", teacher=teacher) for teacher in teachers]
            weighted[term.form].extend(of_each if of_each and needs_labels else [one])
        return cls(
            row_terms=tuple(weighted["row"]),
            sequence_terms=tuple(weighted["sequence"]),
            padding_weight=math.fsum(term.weight for term in terms) if padded else 0.0,
            needs_reference=any("target_logprobs" in term.needs for term in terms),
        )

    @property
    def row_names(self) -> tuple[str, ...]:
        """Of what `rows` gives, in its order."""
        names = (name for term in self.row_terms for name in (term.name, *(f"{term.name}_{own}" for own in term.tells)))
        return (*names, *((PADDING,) if self.padding_weight else ()))

    @property
    def sequence_names(self) -> tuple[str, ...]:
        """Of what `sequences` gives, in its order."""
        return tuple(term.name for term in self.sequence_terms)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all terms: those of rows first."""
        return (*self.row_names, *self.sequence_names)

    @property
    def needs_labels(self) -> bool:
        """Whether a row term looks at the teacher's labels."""
        return any(term.needs_labels for term in self.row_terms)

    def rows(
        self,
        logits: torch.Tensor,
        labels: Mapping[str, torch.Tensor],
        target_ids: torch.Tensor,
        encoding: Encoding | Together | None,
        teacher_head: Head | None = None,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """(loss [n] with gradient, {term name: [n] detached}) of student logits [n, V]; no loss where nothing of the
        objective is a function of one row.

        The values of the terms are bare: nats, at the encoding's temperature, without weight or T^2. `labels` are the
        encoding's columns or what its `prepare` made of them. `padding` [n, P] are the student's logits beyond the
        vocabulary, with gradient, where the objective has a term for them; None there: they count as absent.
        Terms of a teacher count with its weight of each row; of one that did not judge the rows they are 0.
        """
        pairs = pairs_of(encoding, logits, labels, teacher_head) if self.needs_labels else {}
        targets: dict[str, TargetEvent] = {}
        if any(term.needs_target for term in self.row_terms):
            targets = {
                teacher: TargetEvent.of(pair, logits, target_ids, temperature=encoding.temperature)
                for teacher, pair in pairs.items()
            }
        loss, values = None, {}
        for term in self.row_terms:
            if term.needs_labels and term.teacher not in pairs:
                values[term.name] = logits.new_zeros(logits.shape[0])
                continue
            value, told = term.rows(pairs.get(term.teacher), targets.get(term.teacher), logits, target_ids)
            values[term.name] = value.detach()
            values |= {f"{term.name}_{own}": told[own] for own in term.tells}
            value = value * labels[f"{term.teacher}/{WEIGHT}"][:, 0] if term.teacher else value
            loss = value * term.factor if loss is None else loss + value * term.factor
        if self.padding_weight:
            value = logits.new_zeros(logits.shape[0]) if padding is None else padding_nats(logits, padding)
            values[PADDING] = value.detach()
            if padding is not None:
                weighted = value * self.padding_weight
                loss = weighted if loss is None else loss + weighted
        return loss, values

    def sequences(self, scores: SequenceScores) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """(loss [] summed over groups, its gradient by `scores.student` [S], bare sums [] of each sequence term)."""
        with torch.enable_grad():
            student = scores.student.detach().requires_grad_()
            values = [term.function(replace(scores, student=student)).sum() for term in self.sequence_terms]
            loss = sum(value * term.factor for value, term in zip(values, self.sequence_terms, strict=True))
            (gradient,) = torch.autograd.grad(loss, student)
        return loss.detach(), gradient, [value.detach() for value in values]

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Of the terms that have one, by name."""
        terms = (*self.row_terms, *self.sequence_terms)
        return {term.name: term.schedule for term in terms if term.schedule is not None}

    def told(self) -> dict[str, float]:
        """What schedules say of the coming step, as `{term}_{name}`."""
        return {
            f"{term}_{name}": value for term, found in self.schedules.items() for name, value in found.told().items()
        }

    def advance(self, means: Mapping[str, float], progress: float) -> None:
        """Move all schedules. means: of `row_names`, over all rows of all ranks in a step that learnt something."""
        for term in self.row_terms:
            if term.schedule is not None:
                own = {name: means[f"{term.name}_{name}"] for name in term.tells}
                term.schedule.advance({VALUE: means[term.name], **own}, progress)
