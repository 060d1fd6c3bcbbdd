"""Weights of tokens inside a term (`configs/losses.py`): functions of a row, without gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from configs.losses import Confidence, Difficulty, Entropy, Position
from trainer.labels.encoding import ABSENT
from trainer.losses.target import TargetEvent
from trainer.losses.terms import VALUE, Schedule, computes, follows
from trainer.types import PairedLogProbs


@dataclass(frozen=True, slots=True)
class TokenRows:
    """What a weight may look at. Functions of `@computes` get it and give [n], from 0."""

    pair: PairedLogProbs | None  # [n, E]; None where nothing of the objective needs labels
    target: TargetEvent | None  # None where nothing needs the target event
    positions: torch.Tensor | None  # int64 [n], loss tokens before each in its sequence; None where no weight asks


@computes(Entropy)
def entropy(rows: TokenRows, *, at: float, width: float, favour: str) -> torch.Tensor:
    """sigmoid((H - at) / width) of the teacher's entropy H in nats, or 1 - that; of lumped events H is a lower
    bound."""
    assert rows.pair is not None
    teacher, nats = rows.pair.teacher.clamp(min=ABSENT), rows.pair.teacher_entropy
    above = (-(teacher.exp().mul_(teacher)).sum(-1) if nats is None else nats) - at
    weight = torch.sigmoid(above / width) if width else (above > 0).to(above.dtype)
    return weight if favour == "high" else 1.0 - weight


@computes(Confidence)
def confidence(rows: TokenRows, *, power: float, favour: str) -> torch.Tensor:
    """p(target)^power, or (1 - p(target))^power."""
    assert rows.target is not None
    teacher = rows.target.teacher
    return (teacher.exp() if favour == "sure" else -torch.expm1(teacher)).clamp(0.0, 1.0) ** power


@computes(Difficulty)
def difficulty(rows: TokenRows, *, threshold: float, keep: float) -> torch.Tensor:
    """1 / keep where the Hellinger distance sqrt(1 - sum sqrt(p q)) reaches the threshold, else 0: a mean over the rows
    that are kept, once the threshold keeps that share of them."""
    assert rows.pair is not None
    overlap = torch.add(rows.pair.student.detach(), rows.pair.teacher.clamp(min=ABSENT)).mul_(0.5).exp_().sum(-1)
    return ((1.0 - overlap).clamp(min=0.0).sqrt() >= threshold).to(overlap.dtype) / keep


@computes(Position)
def position(rows: TokenRows, *, half_life: int, least: float) -> torch.Tensor:
    """least + (1 - least) 2^(-number of loss tokens before it / half_life)."""
    assert rows.positions is not None
    return least + (1.0 - least) * torch.exp2(-rows.positions / half_life)


@follows(Difficulty)
class KeepTheDifficult(Schedule):
    """AdaKD's share of tokens, as its authors' code moves it: with the running mean of the loss beyond a tolerance
    above or below what it was at the last change, the share grows or shrinks by `change`.

    Theirs are the likeliest of a batch; here a threshold follows the share from step to step, since the loss of a row
    must not depend on which rows come with it. Its temperature for each token is left out: another temperature is
    another label, which lumped tails cannot give.
    """

    def __init__(self, weight: Difficulty) -> None:
        self._weight = weight
        self.numbers = {"keep": weight.keep, "threshold": 0.0, "mean": -1.0, "at_change": -1.0}

    def arguments(self) -> dict[str, float]:
        return {name: self.numbers[name] for name in ("keep", "threshold")}

    def told(self) -> dict[str, float]:
        return {"keep": self.numbers["keep"]}

    def advance(self, means: Mapping[str, float], progress: float) -> None:
        own, old, loss = self._weight, self.numbers, means[VALUE]
        mean = loss if old["mean"] < 0 else own.momentum * old["mean"] + (1 - own.momentum) * loss
        before = mean if old["at_change"] < 0 else old["at_change"]
        keep, change = old["keep"], mean - before
        if abs(change) > own.tolerance * before:
            keep = min(1.0, keep * (1 + own.change)) if change > 0 else max(own.least, keep * (1 - own.change))
            before = mean
        kept = means["weight"] * old["keep"]
        threshold = min(1.0, max(0.0, old["threshold"] + 0.1 * (kept - keep)))
        self.numbers = {"keep": keep, "threshold": threshold, "mean": mean, "at_change": before}


def positions_of(row_sequences: torch.Tensor) -> torch.Tensor:
    """int64 [n]: how many rows before each are of its own sequence; int64 [n] numbers sequences, in ascending order."""
    first = torch.searchsorted(row_sequences, row_sequences)
    return torch.arange(len(row_sequences), device=row_sequences.device) - first
