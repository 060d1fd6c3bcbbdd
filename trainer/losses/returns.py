"""What tokens that the student wrote are weighed by, beside what they earn themselves: rewards of tokens that follow,
a verifier's, and baselines over the other answers.

    before a step   labels, rollout_logprobs --AnswerNumbers of each answer--> all ranks --> given, scale of each row
    in the head     first pass: log q of now --> future of each row          (where returns look ahead)
                    second pass: the term's function of `RolloutRows`         (`trainer/losses/policy.py`)

Baselines and spreads are of the rewards as the answers were written, by the engine's log-probabilities: these are known
before the first backward pass of a step, and equal whatever the ranks, micro-batches and packing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from configs.losses import MiniLlm, PolicyGradient
from trainer.losses.terms import RolloutRows
from trainer.types import WRITTEN

if TYPE_CHECKING:
    from configs.losses import Term
    from trainer.types import PairedLogProbs

REWARDS = "rewards"
"""A column of rewards of single tokens, beside or instead of the answer's own."""
FUTURE, GIVEN, SCALE, REWARD = "future", "given", "scale", "reward"
"""Columns of a term, `<term>/<name>`."""

_LEAST_SPREAD = 1e-6
"""Where all are equal nothing is left to divide."""


@dataclass(frozen=True, slots=True)
class AnswerNumbers:
    """Of one answer to a prompt: its rewards as it was written."""

    group: str
    mean: float  # of the returns of its tokens
    square: float  # of these, the mean
    reward: float  # of all of it


@dataclass(frozen=True, slots=True)
class Scope:
    """Answers that are compared: sums that do not depend on their order."""

    count: int
    mean: float
    square: float
    reward: float
    reward_square: float

    @classmethod
    def of(cls, answers: AbstractSequence[AnswerNumbers]) -> Scope:
        return cls(
            len(answers),
            math.fsum(one.mean for one in answers),
            math.fsum(one.square for one in answers),
            math.fsum(one.reward for one in answers),
            math.fsum(one.reward**2 for one in answers),
        )

    def without(self, one: AnswerNumbers) -> tuple[float, float]:
        """Mean return and mean reward of the others; 0 where there is none."""
        others = self.count - 1
        if others < 1:
            return 0.0, 0.0
        return (self.mean - one.mean) / others, (self.reward - one.reward) / others

    def spreads(self) -> tuple[float, float]:
        """Standard deviations of returns and rewards, each answer counting once; 1 of a single answer."""
        if self.count < 2:
            return 1.0, 1.0
        pairs = ((self.square, self.mean), (self.reward_square, self.reward))
        found = (math.sqrt(max(0.0, square / self.count - (mean / self.count) ** 2)) for square, mean in pairs)
        returns, rewards = (spread + _LEAST_SPREAD for spread in found)
        return returns, rewards


@dataclass(frozen=True, slots=True)
class Returns:
    """How a term weighs a token by more than the token."""

    name: str  # of the term
    discount: float | None  # of later tokens; None: the mean over them
    clip: float | None
    counts_own: bool  # whether what a token earns itself is sampled, and so part of what baselines are of
    baseline: str
    reward_weight: float = 0.0
    whiten: str = "none"

    @classmethod
    def of(cls, name: str, term: Term, *, has_pair: bool) -> Returns | None:
        """None of a term that has none. `has_pair`: the labels hold a distribution."""
        if isinstance(term, PolicyGradient):
            own = not (term.closed_form and has_pair)
            return cls(name, term.discount, term.clip, own, term.baseline, term.reward_weight, term.whiten)
        if isinstance(term, MiniLlm):
            return cls(name, None, term.clip, not has_pair, term.baseline)
        return None

    @property
    def looks_ahead(self) -> bool:
        return self.discount is None or self.discount > 0

    @property
    def samples(self) -> bool:
        """Whether returns of reverse KL are sampled at all."""
        return self.looks_ahead or self.counts_own

    def future(self, student: torch.Tensor, teacher: torch.Tensor, row_sequences: torch.Tensor) -> torch.Tensor:
        """float64 [n] from log-probabilities [n] of the tokens: what those after each earn. row_sequences int64 [n],
        the sequence of each row, ascending."""
        rewards = within(teacher.double() - student.double(), self.clip)
        if self.discount is not None:
            return self.discount * _next(discounted(rewards, row_sequences, self.discount), row_sequences)
        ones = torch.ones_like(rewards)
        after = (_next(discounted(one, row_sequences, 1.0), row_sequences) for one in (rewards, ones))
        total, number = after
        return total / number.clamp(min=1.0)

    def numbers(
        self,
        written: torch.Tensor,
        teacher: torch.Tensor | None,
        rewards: torch.Tensor,
        row_sequences: torch.Tensor,
        groups: AbstractSequence[str],
    ) -> list[AnswerNumbers | None]:
        """Of each answer of a part, from columns [n]; None of one without a row. `teacher` may be missing where nothing
        of reverse KL is sampled."""
        size = len(groups)
        returns = torch.zeros_like(rewards)
        if teacher is not None and self.samples:
            if self.counts_own:
                returns = returns + within(teacher.double() - written.double(), self.clip)
            if self.looks_ahead:
                returns = returns + self.future(written, teacher, row_sequences)
        count = row_sequences.bincount(minlength=size)
        sums = [rewards.new_zeros(size).index_add_(0, row_sequences, one) for one in (returns, returns**2, rewards)]
        found = torch.stack([sums[0] / count, sums[1] / count, sums[2]], dim=1).tolist()
        counts = count.tolist()
        return [
            AnswerNumbers(group, *own) if rows else None for group, own, rows in zip(groups, found, counts, strict=True)
        ]

    def columns(
        self,
        answers: AbstractSequence[AnswerNumbers | None],
        scopes: Mapping[str, Scope],
        rewards: torch.Tensor,
        row_sequences: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """float32 [n] each, `<term>/<name>`: what of a token's advantage is known before its step. `scopes` by group,
        and under an empty name the whole step; none without a baseline."""
        own = [self._of_answer(one, scopes) for one in answers]
        baseline, scale, reward_scale = (
            torch.tensor(column, dtype=torch.float64, device=rewards.device)[row_sequences]
            for column in zip(*own, strict=True)
        )
        after = discounted(rewards, row_sequences, 1.0)
        made = {GIVEN: self.reward_weight * after * reward_scale - baseline, REWARD: self.reward_weight * rewards}
        if self.whiten == "all":
            made[SCALE] = scale
        return {f"{self.name}/{name}": column.float() for name, column in made.items()}

    def _of_answer(self, one: AnswerNumbers | None, scopes: Mapping[str, Scope]) -> tuple[float, float, float]:
        """(baseline, what returns are multiplied by, what rewards are)."""
        if one is None or self.baseline == "none":
            return 0.0, 1.0, 1.0
        scope = scopes[one.group] if self.baseline == "group" else scopes[""]
        if scope.count < 2:  # the other answers to its prompt were left out
            scope = scopes[""]
        returns, rewards = scope.without(one)
        of_returns, of_rewards = scope.spreads()
        scale = 1.0 / of_returns if self.whiten == "all" else 1.0
        reward_scale = 1.0 / of_rewards if self.whiten != "none" else 1.0
        return returns * scale + self.reward_weight * rewards * reward_scale, scale, reward_scale


def scopes_of(answers: Iterable[AnswerNumbers]) -> dict[str, Scope]:
    """By group, and of all under an empty name."""
    found: dict[str, list[AnswerNumbers]] = {"": []}
    for one in answers:
        found[""].append(one)
        found.setdefault(one.group, []).append(one)
    return {group: Scope.of(members) for group, members in found.items()}


def token_rewards(
    rewards: AbstractSequence[float | None], column: torch.Tensor | None, row_sequences: torch.Tensor
) -> torch.Tensor:
    """float64 [n]: of each token its own, and the answer's at its last one. `rewards` [S] of answers, `column` [n]."""
    made = torch.zeros(len(row_sequences), dtype=torch.float64, device=row_sequences.device)
    if column is not None:
        made += column
    last = torch.cat([row_sequences[1:] != row_sequences[:-1], row_sequences.new_ones(1, dtype=torch.bool)])
    own = torch.tensor([one or 0.0 for one in rewards], dtype=torch.float64, device=made.device)
    return made + own[row_sequences] * last[: len(made)] if len(made) else made


def discounted(values: torch.Tensor, row_sequences: torch.Tensor, discount: float) -> torch.Tensor:
    """sum over j >= 0 of discount^j values[t + j] inside each sequence, [n]; spans that double, log2(n) passes."""
    total, span, longest = values, 1, int(row_sequences.bincount().max()) if len(values) else 0
    while span < longest:
        shifted = torch.zeros_like(total)
        same = row_sequences[span:] == row_sequences[:-span]
        shifted[:-span] = torch.where(same, total[span:], 0.0)
        total = total + discount**span * shifted
        span *= 2
    return total


def _next(values: torch.Tensor, row_sequences: torch.Tensor) -> torch.Tensor:
    """Of each row the value of the one after it in its sequence, 0 at the last."""
    moved = torch.zeros_like(values)
    moved[:-1] = torch.where(row_sequences[1:] == row_sequences[:-1], values[1:], 0.0)
    return moved


def within(nats: torch.Tensor, clip: float | None) -> torch.Tensor:
    return nats if clip is None else nats.clamp(-clip, clip)


def rollout_rows(
    name: str,
    logprobs: tuple[torch.Tensor, torch.Tensor],
    columns: Mapping[str, torch.Tensor],
    pair: PairedLogProbs | None,
    event: torch.Tensor | None,
) -> RolloutRows:
    """Of a term, from log-probabilities [n] of student (with gradient) and teacher."""
    if WRITTEN not in columns:
        raise ValueError(f"{name} needs the column {WRITTEN}, which only text has that the student wrote")
    student, teacher = logprobs
    nothing = torch.zeros_like(teacher)
    return RolloutRows(
        student=student,
        teacher=teacher,
        written=columns[WRITTEN],
        pair=pair,
        event=event,
        future=columns.get(f"{name}/{FUTURE}", nothing),
        given=columns.get(f"{name}/{GIVEN}", nothing),
        scale=columns.get(f"{name}/{SCALE}", torch.ones_like(teacher)),
        reward=columns.get(f"{name}/{REWARD}", nothing),
    )
