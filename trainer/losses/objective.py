"""The weighted sum of terms that a student minimises, and the only file that adds rows of different terms together.

    loss[row] = sum over divergences  weight * T^2 * D(pair at temperature T)[row], each with its weights of tokens
              + weight * (-log q(target id))[row]  for cross_entropy, always at T = 1
              + (sum of the weights) * (-log(1 - mass on padding))[row]  for a head with rows beyond the vocabulary

T^2 keeps the size of the gradient when the temperature changes (Hinton et al., arXiv 1503.02531, section 2). Rows are
summed by `trainer/losses/fused.py`, times the rows' own weights, and divided by the *global* number of loss tokens of
the step by whoever calls it.

Sequence terms are functions of whole answers. `fused.py` asks for their value and their gradient by the rows'
log-probabilities before it goes through the rows. Terms on text that the student wrote (`policy.py`) may ask for the
same pass, to look ahead of a row (`returns.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from configs.losses import CrossEntropy
from trainer.labels.encoding import ALIGNED, Encoding
from trainer.losses import alignment, distances, features, kl, listwise, mixtures, policy, preference, schedules  # noqa: F401 - they register
from trainer.losses.ensemble import WEIGHT, Together, pairs_of, told_target
from trainer.losses.padding import padding_nats
from trainer.losses.returns import FUTURE, Returns, rollout_rows
from trainer.losses.target import TargetEvent
from trainer.losses.terms import (
    VALUE,
    Schedule,
    SequenceScores,
    check_complete,
    computes,
    function_of,
    schedule_of,
)
from trainer.losses.token_weights import TokenRows
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from configs.losses import Need, Term, TokenWeight
    from trainer.model.head import Head

PADDING = "padding"


@computes(CrossEntropy)
def cross_entropy(logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """-log q(target id), [N] from logits [N, V]."""
    return functional.cross_entropy(logits, target_ids, reduction="none")


check_complete()


@dataclass(frozen=True, slots=True)
class TokenWeightOf:
    """One weight of tokens of a term, as `WeightedTerm` has its function."""

    kind: str
    function: Callable[..., torch.Tensor]
    needs: frozenset[Need]
    schedule: Schedule | None = None

    @classmethod
    def of(cls, weight: TokenWeight) -> TokenWeightOf:
        schedule = schedule_of(weight)
        own = {name: value for name, value in weight if name != "kind"}
        function = function_of(weight) if schedule else partial(function_of(weight), **own)
        return cls(weight.kind.rpartition(".")[2], function, weight.needs, schedule)

    def rows(self, rows: TokenRows) -> torch.Tensor:
        """[n], without gradient."""
        return self.function(rows, **({} if self.schedule is None else self.schedule.arguments())).detach()


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
    weights: tuple[TokenWeightOf, ...] = ()  # of tokens, multiplied
    teacher: str = ""  # of several with terms of their own: its name
    on_rollouts: bool = False  # its function is one of `RolloutRows`
    returns: Returns | None = None  # by which it weighs them

    @property
    def names(self) -> tuple[str, ...]:
        """Of all numbers that each row has of it: its value, what it tells, its weights of tokens."""
        own = (*self.tells, *(f"weight_{weight.kind}" for weight in self.weights))
        return (self.name, *(f"{self.name}_{name}" for name in own))

    def weights_need(self, need: Need) -> bool:
        return any(need in weight.needs for weight in self.weights)

    def rows(
        self, pair: PairedLogProbs | None, target: TargetEvent | None, logits: torch.Tensor, target_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """([n] with gradient, what it tells of these rows)."""
        given = ((pair, target) if self.needs_target else (pair,)) if self.needs_labels else (logits, target_ids)
        return self.of(*given)

    def of(self, *given: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """`rows`, from what its function takes."""
        arguments = {} if self.schedule is None else self.schedule.arguments()
        found = self.function(*given, **arguments)
        return found if self.tells else (found, {})


@dataclass(frozen=True, slots=True)
class Objective:
    """The terms in the order of the config; `padding_weight` is that of `trainer/losses/padding.py`, 0 where the
    student's head has no rows beyond the vocabulary."""

    row_terms: tuple[WeightedTerm, ...]
    sequence_terms: tuple[WeightedTerm, ...] = ()
    feature_names: tuple[str, ...] = ()  # of terms on states inside the models (`trainer/model/features.py`)
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
        weighted: dict[str, list[WeightedTerm]] = {"row": [], "sequence": [], "features": []}
        for position, term in enumerate(terms):
            nth = 1 + sum(earlier.loss == term.loss for earlier in terms[:position])
            needs_labels, schedule = "labels" in term.needs, schedule_of(term)
            assert encoding is not None or not term.needs & {"labels", "target_logprobs"}, term
            name = term.loss if nth == 1 else f"{term.loss}_{nth}"
            on_rollouts = "rollouts" in term.needs
            if on_rollouts:  # the sampled token alone is enough for them
                needs_labels = "target_event" in encoding.gives
            one = WeightedTerm(
                name=name,
                factor=term.weight * encoding.temperature**2 if needs_labels else term.weight,
                function=function_of(term) if schedule else partial(function_of(term), **term.parameters()),
                needs_labels=needs_labels,
                needs_target="target_event" in term.needs or (on_rollouts and needs_labels),
                tells=term.tells,
                schedule=schedule,
                weights=tuple(TokenWeightOf.of(weight) for weight in term.token_weights),
                on_rollouts=on_rollouts,
                returns=Returns.of(name, term, has_pair=needs_labels) if on_rollouts else None,
            )
            of_each = [replace(one, name=f"{one.name}/{teacher}", teacher=teacher) for teacher in teachers]
            weighted[term.form].extend(of_each if of_each and needs_labels else [one])
        return cls(
            row_terms=tuple(weighted["row"]),
            sequence_terms=tuple(weighted["sequence"]),
            feature_names=tuple(term.name for term in weighted["features"]),
            padding_weight=math.fsum(term.weight for term in terms if term.form != "features") if padded else 0.0,
            needs_reference=any("target_logprobs" in term.needs for term in terms),
        )

    @property
    def row_names(self) -> tuple[str, ...]:
        """Of what `rows` gives, in its order."""
        names = (name for term in self.row_terms for name in term.names)
        return (*names, *((PADDING,) if self.padding_weight else ()))

    @property
    def sequence_names(self) -> tuple[str, ...]:
        """Of what `sequences` gives, in its order."""
        return tuple(term.name for term in self.sequence_terms)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all terms of the head: those of rows first."""
        return (*self.row_names, *self.sequence_names)

    @property
    def needs_labels(self) -> bool:
        """Whether a row term or a weight of its tokens looks at the teacher's labels."""
        return any(term.needs_labels or term.weights_need("labels") for term in self.row_terms)

    @property
    def returns(self) -> tuple[Returns, ...]:
        """Of all terms that have some."""
        return tuple(term.returns for term in self.row_terms if term.returns is not None)

    @property
    def on_rollouts(self) -> bool:
        """Whether a term is on text that the student wrote."""
        return any(term.on_rollouts for term in self.row_terms)

    @property
    def looks_ahead(self) -> bool:
        """Whether a row's gradient depends on the rows after it in its sequence."""
        return any(returns.looks_ahead for returns in self.returns)

    def futures(
        self, student: torch.Tensor, teacher: torch.Tensor, row_sequences: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What `columns` of `rows` lack, float32 [n]: by log-probabilities [n] of the target ids by both models."""
        return {
            f"{returns.name}/{FUTURE}": returns.future(student, teacher, row_sequences).float()
            for returns in self.returns
            if returns.looks_ahead
        }

    def rows(
        self,
        logits: torch.Tensor,
        labels: Mapping[str, torch.Tensor],
        target_ids: torch.Tensor,
        encoding: Encoding | Together | None,
        teacher_head: Head | None = None,
        padding: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        columns: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """(loss [n] with gradient, {term name: [n] detached}) of student logits [n, V]; no loss where nothing of the
        objective is a function of one row.

        The values of the terms are bare: nats, at the encoding's temperature, without weight or T^2. `labels` are the
        encoding's columns or what its `prepare` made of them. `padding` [n, P] are the student's logits beyond the
        vocabulary, with gradient, where the objective has a term for them; None there: they count as absent.
        `positions` int64 [n] are asked for by weights of tokens alone (see `TokenRows`), `columns` float32 [n] by terms
        on text that the student wrote (`returns.py`).

        Terms of a teacher count with its weight of each row; of one that did not judge the rows they are 0.
        """
        pairs = pairs_of(encoding, logits, labels, teacher_head) if self.needs_labels else {}
        targets: dict[str, TargetEvent] = {}
        if any(term.needs_target or term.weights_need("target_event") for term in self.row_terms):
            targets = {
                teacher: TargetEvent.of(pair, logits, target_ids, temperature=encoding.temperature)
                for teacher, pair in pairs.items()
            }
        loss, values = None, {}
        for term in self.row_terms:
            if term.needs_labels and term.teacher not in pairs:
                values |= dict.fromkeys(term.names, logits.new_zeros(logits.shape[0]))
                continue
            aligned = labels.get(f"{term.teacher}/{ALIGNED}" if term.teacher else ALIGNED)
            pair, target = pairs.get(term.teacher), targets.get(term.teacher)
            if term.on_rollouts:
                logprobs = _target_logprobs(pair, target, labels, logits, target_ids)
                event = None if target is None else target.event
                value, told = term.of(rollout_rows(term.name, logprobs, columns, pair, event))
            else:
                value, told = term.rows(pair, target, logits, target_ids)
            if aligned is not None and term.needs_labels:
                value, told = value * aligned[:, 0], {name: one * aligned[:, 0] for name, one in told.items()}
            weights = [weight.rows(TokenRows(pair, target, positions)) for weight in term.weights]
            found = (value.detach(), *(told[own] for own in term.tells), *weights)
            values |= dict(zip(term.names, found, strict=True))
            own = [labels[f"{term.teacher}/{WEIGHT}"][:, 0]] if term.teacher else []
            weighted = math.prod((*weights, *own), start=value * term.factor)
            loss = weighted if loss is None else loss + weighted
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
        """Of the row terms and weights of tokens that have one, by name."""
        found = {}
        for term in self.row_terms:
            own = {term.name: term.schedule} | {f"{term.name}_{one.kind}": one.schedule for one in term.weights}
            found |= {name: schedule for name, schedule in own.items() if schedule is not None}
        return found

    def told(self) -> dict[str, float]:
        """What schedules say of the coming step, as `{term}_{name}`, or `{term}_{weight}_{name}`."""
        found = self.schedules.items()
        return {f"{term}_{name}": value for term, one in found for name, value in one.told().items()}

    def advance(self, means: Mapping[str, float], progress: float) -> None:
        """Move all schedules. means: of `row_names`, over all rows of all ranks in a step that learnt something."""
        for term in self.row_terms:
            value = {VALUE: means[term.name]}
            if term.schedule is not None:
                own = {name: means[f"{term.name}_{name}"] for name in term.tells}
                term.schedule.advance(value | own, progress)
            for weight in term.weights:
                if weight.schedule is not None:
                    own = {"weight": means[f"{term.name}_weight_{weight.kind}"]}
                    weight.schedule.advance(value | own, progress)


def _target_logprobs(
    pair: PairedLogProbs | None,
    target: TargetEvent | None,
    labels: Mapping[str, torch.Tensor],
    logits: torch.Tensor,
    target_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [n] of the target ids by student, with gradient, and teacher; the latter as the labels hold it
    before anything else, which is not rounded."""
    teacher = told_target(labels)
    if pair is None or target is None:
        return -functional.cross_entropy(logits, target_ids, reduction="none"), teacher
    student = pair.student.gather(1, target.event[:, None])[:, 0] if pair.exhaustive else target.student
    return student, target.teacher if teacher is None else teacher
