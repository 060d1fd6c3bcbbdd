"""Divergences against float64 brute force and against the closed forms of their gradients."""

from __future__ import annotations

import math
from functools import partial

import loss_oracles as oracle
import pytest
import torch

from trainer.labels.encoding import ABSENT
from trainer.losses.kl import forward_kl, reverse_kl
from trainer.losses.mixtures import jsd, skew_forward_kl
from trainer.losses.terms import function_of
from trainer.types import PairedLogProbs

TEACHER = oracle.realistic_logits(7, 31, seed=1).double()
STUDENT = oracle.realistic_logits(7, 31, seed=2).double()
P, Q = TEACHER.softmax(-1), STUDENT.softmax(-1)
BETAS = (0.1, 0.5, 0.9)
TERMS = [
    oracle.term("forward_kl"),
    oracle.term("reverse_kl"),
    oracle.term("jsd", beta=0.3),
    oracle.term("skew_forward_kl", alpha=0.2),
]
DIVERGENCES = {one.loss: partial(function_of(one), **one.parameters()) for one in TERMS}


def pair(student_logits: torch.Tensor, teacher_logits: torch.Tensor = TEACHER) -> PairedLogProbs:
    return PairedLogProbs(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), exhaustive=True)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=1e-7)


def test_values_equal_the_definitions():
    close(forward_kl(pair(STUDENT)), (P * (P / Q).log()).sum(-1))
    close(reverse_kl(pair(STUDENT)), (Q * (Q / P).log()).sum(-1))
    for beta in BETAS:
        close(jsd(pair(STUDENT), beta=beta), oracle.jsd(P, Q, beta))
        close(skew_forward_kl(pair(STUDENT), alpha=beta), (P * (P / (beta * P + (1 - beta) * Q)).log()).sum(-1))


def test_the_gradient_of_forward_kl_is_q_minus_p():
    close(oracle.gradient(lambda z: forward_kl(pair(z)), STUDENT), Q - P)


def test_the_gradient_of_reverse_kl_is_q_times_the_centred_log_ratio():
    value = reverse_kl(pair(STUDENT))[:, None]
    close(oracle.gradient(lambda z: reverse_kl(pair(z)), STUDENT), Q * ((Q / P).log() - value))


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_of_jsd_is_its_closed_form(beta: float):
    log_ratio = (Q / (beta * P + (1 - beta) * Q)).log()
    expected = (1 - beta) * Q * (log_ratio - (Q * log_ratio).sum(-1, keepdim=True))
    close(oracle.gradient(lambda z: jsd(pair(z), beta=beta), STUDENT), expected)


@pytest.mark.parametrize("alpha", BETAS)
def test_the_gradient_of_skew_forward_kl_is_its_closed_form(alpha: float):
    ratio = P / (alpha * P + (1 - alpha) * Q)
    expected = (1 - alpha) * Q * ((Q * ratio).sum(-1, keepdim=True) - ratio)
    close(oracle.gradient(lambda z: skew_forward_kl(pair(z), alpha=alpha), STUDENT), expected)


@pytest.mark.parametrize("alpha", BETAS)
def test_skew_forward_kl_is_bounded_and_goes_over_into_forward_kl(alpha: float):
    one, other = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    assert skew_forward_kl(pair(one, other), alpha=alpha).item() == pytest.approx(-math.log(alpha), rel=1e-6)
    small = skew_forward_kl(pair(STUDENT), alpha=1e-14)
    torch.testing.assert_close(small, forward_kl(pair(STUDENT)), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_bounded_by_the_entropy_of_beta_even_for_disjoint_distributions(beta: float):
    entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    one, other = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    value = jsd(pair(one, other), beta=beta).item()
    assert value == pytest.approx(entropy, rel=1e-6)


def test_jsd_goes_over_into_both_kls_at_its_ends():
    for limit, expected in (
        (jsd(pair(STUDENT), beta=1e-7) / 1e-7, forward_kl(pair(STUDENT))),
        (jsd(pair(STUDENT), beta=1 - 1e-7) / 1e-7, reverse_kl(pair(STUDENT))),
    ):
        torch.testing.assert_close(limit, expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_equal_distributions_have_divergence_and_gradient_zero(name: str):
    logits = TEACHER.float()
    value = DIVERGENCES[name](pair(logits, logits))
    assert value.abs().max() < 1e-6
    assert oracle.gradient(lambda z: DIVERGENCES[name](pair(z, logits)), logits).abs().max() < 1e-6


@pytest.mark.parametrize("absent", [-math.inf, ABSENT])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_events_the_teacher_gives_no_probability_leave_value_and_gradient_finite(name: str, absent: float):
    (extra,) = (one.parameters() for one in TERMS if one.loss == name)
    kept = TEACHER[:, :-3].float().log_softmax(-1)
    teacher = torch.cat([kept, torch.full((7, 3), absent)], -1)

    def rows(z: torch.Tensor) -> torch.Tensor:
        return DIVERGENCES[name](PairedLogProbs(z.log_softmax(-1), teacher, exhaustive=True))

    value = rows(STUDENT.float())
    assert value.isfinite().all()
    assert oracle.gradient(rows, STUDENT.float()).isfinite().all()
    if name != "reverse_kl":  # its true value is infinite here
        expected = oracle.DIVERGENCES[name](teacher.double().exp(), Q, **extra)
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)


def test_events_absent_on_both_sides_count_for_nothing():
    student = torch.cat([STUDENT.float().log_softmax(-1), torch.full((7, 1), ABSENT)], -1)
    teacher = torch.cat([TEACHER.float().log_softmax(-1), torch.full((7, 1), ABSENT)], -1)
    widened, plain = PairedLogProbs(student, teacher, exhaustive=True), pair(STUDENT.float(), TEACHER.float())
    for function in DIVERGENCES.values():
        torch.testing.assert_close(function(widened), function(plain))
