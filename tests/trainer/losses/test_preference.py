"""Terms that compare answers, through both passes of the head, against autograd in float64 over the whole formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from configs.losses import CrossEntropy, Dpo
from trainer.labels.token import Encoding
from trainer.losses.fused import HeadLoss, LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.losses.preference import dpo
from trainer.losses.terms import SequenceScores
from trainer.model.head import HeadShape

N, H, V = 40, 16, 101
LENGTHS = (9, 4, 0, 12, 8, 7)
ROW_SEQUENCES = torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS))
GROUPS = ((1, 0), (3, 2), (4, 5))  # chosen, rejected
BETA = 0.4


def _tensors() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) / 2
    bias, reference = torch.randn(V, generator=g) / 4, torch.randn(N, V, generator=g)
    ids = torch.randint(V, (N,), generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), reference, ids


def _ours(*, chunk_rows: int = 7, terms: tuple = (Dpo(beta=BETA),), weights: bool = False, shift: int = 0) -> tuple:
    hidden, weight, bias, reference, ids = _tensors()
    objective = Objective.of(terms, Encoding())
    part = LossPart(
        rows=slice(0, N),
        labels=Encoding().encode(reference.roll(shift, 0), ids),
        encoding=Encoding(),
        objective=objective,
        scale=1 / N,
        row_weights=torch.linspace(0.1, 2.0, N) if weights else None,
        group_scale=1 / 3,
        row_sequences=ROW_SEQUENCES,
        groups=GROUPS,
        rewards=(None,) * 6,
    )
    shape = HeadShape()
    made = head_loss(
        hidden, weight, bias, ids, head_shape=shape, vocabulary_size=V, parts=[part], chunk_rows=chunk_rows
    )
    return made, torch.autograd.grad(made.loss, (hidden, weight, bias))


def _brute_force(*, cross_entropy: float = 0.0, weights: bool = False) -> tuple:
    hidden, weight, bias, reference, ids = _tensors()
    logits = hidden.double() @ weight.double().T + bias.double()
    student = logits.log_softmax(1).gather(1, ids[:, None])[:, 0]
    teacher = reference.double().log_softmax(1).gather(1, ids[:, None])[:, 0]
    loss = torch.zeros((), dtype=torch.float64)
    for chosen, rejected in GROUPS:
        better, worse = ((student - teacher)[index == ROW_SEQUENCES].sum() for index in (chosen, rejected))
        loss = loss - torch.log(1 / (1 + torch.exp(-BETA * (better - worse)))) / 3
    row_weights = torch.linspace(0.1, 2.0, N).double() if weights else torch.ones(N).double()
    loss = loss - cross_entropy * (row_weights * student).sum() / N
    return loss, torch.autograd.grad(loss, (hidden, weight, bias))


def _assert_equal(ours: tuple[HeadLoss, tuple], exact: tuple) -> None:
    torch.testing.assert_close(ours[0].loss.double(), exact[0], rtol=1e-5, atol=1e-6)
    for actual, expected in zip(ours[1], exact[1], strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 7, 512])
def test_value_and_gradients_of_dpo_equal_the_whole_formula(chunk_rows: int) -> None:
    made = _ours(chunk_rows=chunk_rows)
    _assert_equal(made, _brute_force())
    torch.testing.assert_close(made[0].sums[0]["dpo"] / 3, _brute_force()[0].detach())
    with pytest.raises(AssertionError):
        _assert_equal(_ours(chunk_rows=chunk_rows, shift=1), _brute_force())


def test_rows_may_have_weighted_terms_beside_the_comparison() -> None:
    terms = (Dpo(beta=BETA), CrossEntropy(weight=0.3))
    _assert_equal(_ours(terms=terms, weights=True), _brute_force(cross_entropy=0.3, weights=True))


def _scores(student: list[float], reference: list[float]) -> SequenceScores:
    made = (torch.tensor(values, dtype=torch.float64) for values in (student, reference))
    return SequenceScores(*made, num_rows=torch.ones(len(student)), rewards=(None,) * len(student), groups=((0, 1),))


def test_a_student_that_is_the_reference_has_loss_log_two_and_the_closed_form_gradient() -> None:
    equal = _scores([-3.0, -8.0], [-3.0, -8.0])
    assert dpo(equal, beta=0.1).item() == pytest.approx(math.log(2))
    student = torch.tensor([-2.0, -9.0], dtype=torch.float64, requires_grad=True)
    value = dpo(replace(equal, student=student), beta=0.5)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    slope = 0.5 / (1 + math.exp(0.5 * 2.0))
    assert gradient.tolist() == pytest.approx([-slope, slope])
    swapped = dpo(replace(equal, student=student.detach(), groups=((1, 0),)), beta=0.5)
    assert swapped.item() == pytest.approx(value.item() + 0.5 * 2.0)


def test_a_group_of_three_answers_is_no_pair() -> None:
    three = replace(_scores([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]), groups=((0, 1, 2),))
    with pytest.raises(ValueError, match="compares two answers to a prompt, a group has 3"):
        dpo(three, beta=0.1)
