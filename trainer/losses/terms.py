"""The registry of terms: which function computes a term of `configs/losses.py`.

The class of a term says what can be known without torch: its parameters, what it needs, in which form it comes, and how
exact it is for each encoding. The function stands in a file of this folder, under `@computes(Class)`, and takes the
parameters of its class as keywords. By the class it gets

    a row term that needs labels      PairedLogProbs, log-probabilities of both models    -> [N] nats
    a row term that needs none        student logits [N, V], target ids [N]               -> [N] nats
    a sequence term                   SequenceScores, whole answers by groups             -> [G], one value per group
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from configs.losses import LOSSES, Term
from trainer.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., torch.Tensor])

_FUNCTIONS: dict[type[Term], Callable[..., torch.Tensor]] = {}


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


def computes(term: type[Term]) -> Callable[[Function], Function]:
    """Decorator: the function that computes the terms of this class."""

    def register(function: Function) -> Function:
        assert term not in _FUNCTIONS, f"{term.__name__} is computed by {_FUNCTIONS[term].__name__} already"
        _FUNCTIONS[term] = function
        return function

    return register


def function_of(term: Term) -> Callable[..., torch.Tensor]:
    """What computes a term, without its parameters bound. Raises `ConfigError` for a term of a user's without one."""
    if type(term) not in _FUNCTIONS:
        raise ConfigError(
            f"loss: {term.loss}: nothing computes it; write @computes(Term) (of trainer.losses.terms) over a function "
            "of that file"
        )
    return _FUNCTIONS[type(term)]


def check_complete() -> None:
    """Raises `AssertionError` where a class of `configs/losses.py` has no function, called when all are loaded."""
    missing = [term.__name__ for term in LOSSES.built_in if term not in _FUNCTIONS]
    assert not missing, f"no function of trainer/losses computes {', '.join(missing)}"
