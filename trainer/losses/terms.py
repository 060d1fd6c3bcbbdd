"""The registry of terms: which function computes a term of `configs/losses.py`.

The class of a term says what can be known without torch: its parameters, what it needs, in which form it comes, and how
exact it is for each encoding. The function stands in a file of this folder, under `@computes(Class)`, and takes the
parameters of its class as keywords. By the class it gets

    a row term that needs labels      PairedLogProbs, log-probabilities of both models    -> [N] nats
    and target events                 the same, and a TargetEvent                         -> [N] nats
    a row term that needs rollouts    RolloutRows, sampled tokens                         -> [N] nats
    a row term that needs none        student logits [N, V], target ids [N]               -> [N] nats
    a sequence term                   SequenceScores, whole answers by groups             -> [G], one value per group
    a term on features                states [n, H] of student and teacher                -> [n]

A row term whose class `tells` something returns ([N], {name: [N]}). One with a schedule, a class under
`@follows(Class)`, gets the numbers of that in place of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from configs.losses import LOSSES, TOKEN_WEIGHTS, Term, TokenWeight
from configs.section import Section
from trainer.errors import ConfigError
from trainer.types import PairedLogProbs

Function = TypeVar("Function", bound=Callable[..., Any])
Made = TypeVar("Made", bound="type[Schedule]")

VALUE = "value"

_FUNCTIONS: dict[type[Section], Callable[..., Any]] = {}
_SCHEDULES: dict[type[Section], type[Schedule]] = {}


@dataclass(frozen=True, slots=True)
class SequenceScores:
    """Whole answers of one task in one micro-batch, for sequence terms.

    A log-probability of an answer is the sum over its loss rows of log q(target id), in nats, at temperature 1.
    """

    student: torch.Tensor  # float64 [S], carries the gradient
    reference: torch.Tensor | None  # float64 [S], by the teacher that the task names; None where no term needs it
    num_rows: torch.Tensor  # int64 [S]
    rewards: tuple[float | None, ...]  # [S]
    groups: tuple[tuple[int, ...], ...]  # [G] positions in S: the answers to one prompt, in the order of their samples


@dataclass(frozen=True, slots=True)
class RolloutRows:
    """Tokens that the student wrote, for terms on them: all [n], nats at temperature 1. `student` and the pair's
    student carry gradients. `trainer/losses/returns.py` says where the last four come from."""

    student: torch.Tensor  # log q of the token by the student of now
    teacher: torch.Tensor  # log p of it
    written: torch.Tensor  # of it in the distribution that the engine drew it from
    pair: PairedLogProbs | None  # None: the labels hold nothing but the token
    event: torch.Tensor | None  # int64, the pair's event that the token is or lies in
    future: torch.Tensor  # what the tokens after it earn
    given: torch.Tensor  # what the advantage holds beside: a verifier's reward, less baselines
    scale: torch.Tensor  # of what the token and those after it earn
    reward: torch.Tensor  # of the token, by a verifier, times its weight


class Schedule:
    """Base of what moves a term's numbers from step to step: a function of means over all ranks and of what it was, so
    that it is equal on all of them."""

    numbers: dict[str, float]
    """All of its state, as a checkpoint keeps it."""

    def __init__(self, term: Any) -> None:
        raise NotImplementedError

    def arguments(self) -> dict[str, float]:
        """Keywords of the term's function in the coming step."""
        raise NotImplementedError

    def told(self) -> dict[str, float]:
        """What the metrics of the coming step say of it."""
        return {}

    def advance(self, means: Mapping[str, float], progress: float) -> None:
        """After a step that learnt something. means: the term's bare value, as `value`, and what it `tells` or the
        weight itself, as `weight`, over all its rows on all ranks; progress: the share of the run that is done."""
        raise NotImplementedError


def computes(term: type[Section]) -> Callable[[Function], Function]:
    """Decorator: the function that computes the terms, or weights of tokens, of this class."""

    def register(function: Function) -> Function:
        assert term not in _FUNCTIONS, f"{term.__name__} is computed by {_FUNCTIONS[term].__name__} already"
        _FUNCTIONS[term] = function
        return function

    return register


def follows(term: type[Section]) -> Callable[[Made], Made]:
    """Decorator: the schedule of the terms, or weights of tokens, of this class."""

    def register(schedule: Made) -> Made:
        assert term not in _SCHEDULES, f"{term.__name__} follows {_SCHEDULES[term].__name__} already"
        _SCHEDULES[term] = schedule
        return schedule

    return register


def schedule_of(term: Section) -> Schedule | None:
    """A new schedule for a term or weight, None where its numbers stand still."""
    made = _SCHEDULES.get(type(term))
    return None if made is None else made(term)


def function_of(term: Term | TokenWeight) -> Callable[..., Any]:
    """What computes a term or a weight of tokens, without its parameters bound. Raises `ConfigError` for one of a
    user's without a function."""
    if type(term) not in _FUNCTIONS:
        what = f"loss: {term.loss}" if isinstance(term, Term) else f"kind: {term.kind}"
        raise ConfigError(
            f"{what}: nothing computes it; write @computes({type(term).__name__}) (of trainer.losses.terms) over a "
            "function of that file"
        )
    return _FUNCTIONS[type(term)]


def check_complete() -> None:
    """Raises `AssertionError` where a class of `configs/` has no function, called when all are loaded."""
    classes = (*LOSSES.built_in, *TOKEN_WEIGHTS.built_in)
    missing = [one.__name__ for one in classes if one not in _FUNCTIONS]
    assert not missing, f"no function of trainer/losses computes {', '.join(missing)}"
