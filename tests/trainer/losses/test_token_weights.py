"""Weights of tokens inside a term, against their definitions in float64, through the objective and the fused head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import loss_oracles as oracle
import pytest
import torch

from configs.labels import Dense as DenseLabels
from configs.labels import TopK as TopKLabels
from configs.losses import LOSSES, TOKEN_WEIGHTS, Difficulty, Term
from trainer.labels import dense, topk
from trainer.losses.fused import LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.losses.terms import VALUE, schedule_of
from trainer.losses.token_weights import positions_of
from trainer.model.head import HeadShape

N, V, H = 12, 97, 16
TEACHER = oracle.realistic_logits(N, V, seed=1)
STUDENT = oracle.realistic_logits(N, V, seed=2)
TARGET_IDS = TEACHER.argsort(-1, descending=True)[torch.arange(N), torch.tensor([0, 0, 0, 1, 2, 5, 9, 40, 80, 0, 3, 1])]
ROW_SEQUENCES = torch.tensor([0] * 5 + [2] + [3] * 6)
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5])
P, Q = oracle.probabilities(TEACHER), oracle.probabilities(STUDENT)
P_TARGET = P.gather(1, TARGET_IDS[:, None])[:, 0]
ENTROPY = -(P * P.log()).sum(-1)
HELLINGER = ((P.sqrt() - Q.sqrt()).square().sum(-1) / 2).sqrt()

WEIGHTS: list[tuple[dict[str, Any], Callable[[], torch.Tensor]]] = [
    ({"kind": "entropy"}, lambda: 1 / (1 + torch.exp(-(ENTROPY - 1.0) / 0.25))),
    ({"kind": "entropy", "at": 1.7, "width": 0.0}, lambda: (ENTROPY > 1.7).double()),
    ({"kind": "entropy", "favour": "low", "width": 0.5}, lambda: 1 - 1 / (1 + torch.exp(-(ENTROPY - 1.0) / 0.5))),
    ({"kind": "confidence"}, lambda: P_TARGET),
    ({"kind": "confidence", "favour": "unsure", "power": 2.0}, lambda: (1 - P_TARGET) ** 2),
    ({"kind": "position", "half_life": 2, "least": 0.25}, lambda: 0.25 + 0.75 * 0.5 ** (POSITIONS / 2)),
    ({"kind": "difficulty", "keep": 0.5}, lambda: torch.full((N,), 2.0)),
]
IDS = [str(weight) for weight, _ in WEIGHTS]


def _term(loss: str, *weights: dict[str, Any], **parameters: Any) -> Term:
    return LOSSES.validate({"loss": loss, "token_weights": list(weights), **parameters})


def _rows(terms: tuple[Term, ...], encoding: Any, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    labels = encoding.encode(TEACHER, TARGET_IDS)
    return Objective.of(terms, encoding).rows(logits, labels, TARGET_IDS, encoding, positions=POSITIONS)


def test_every_kind_of_the_registry_is_tested_here():
    assert {weight["kind"] for weight, _ in WEIGHTS} == set(TOKEN_WEIGHTS.kinds())


@pytest.mark.parametrize(("weight", "expected"), WEIGHTS, ids=IDS)
def test_a_weight_multiplies_value_and_gradient_of_each_row_and_has_no_gradient_itself(
    weight: dict[str, Any], expected: Callable[[], torch.Tensor]
):
    term = _term("reverse_kl", weight)
    loss, told = _rows((term,), dense.Encoding(), STUDENT)
    torch.testing.assert_close(
        told[f"reverse_kl_weight_{weight['kind']}"].double(), expected().double(), atol=1e-5, rtol=1e-5
    )
    token = expected().double()
    torch.testing.assert_close(told["reverse_kl"].double(), oracle.reverse_kl(P, Q), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.double(), token * oracle.reverse_kl(P, Q), atol=1e-5, rtol=1e-5)
    gradient = oracle.gradient(lambda z: _rows((term,), dense.Encoding(), z)[0], STUDENT)
    exact = oracle.gradient(lambda z: token * oracle.reverse_kl(P, oracle.probabilities(z)), STUDENT.double())
    torch.testing.assert_close(gradient.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("weight", "expected"), WEIGHTS[:-1], ids=IDS[:-1])  # difficulty keeps all rows at first
def test_weights_of_other_rows_would_be_seen(weight: dict[str, Any], expected: Callable[[], torch.Tensor]):
    _, told = _rows((_term("forward_kl", weight),), dense.Encoding(), STUDENT)
    found = told[f"forward_kl_weight_{weight['kind']}"].double()
    assert (found - expected().roll(1, 0)).abs().max() > 0.1


def test_weights_are_multiplied_and_are_those_of_their_term_alone():
    both = _term("forward_kl", {"kind": "confidence"}, {"kind": "position", "half_life": 3}, weight=0.5)
    loss, told = _rows((both, _term("cross_entropy")), dense.Encoding(), STUDENT)
    weight = P_TARGET * 0.5 ** (POSITIONS / 3)
    nats = -Q.gather(1, TARGET_IDS[:, None])[:, 0].log()
    expected = 0.5 * weight * oracle.forward_kl(P, Q) + nats
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    assert list(told) == ["forward_kl", "forward_kl_weight_confidence", "forward_kl_weight_position", "cross_entropy"]


def test_hard_labels_may_be_weighted_by_what_the_teacher_says():
    objective = Objective.of((_term("cross_entropy", {"kind": "confidence"}),), dense.Encoding())
    assert objective.needs_labels
    loss, _ = _rows((_term("cross_entropy", {"kind": "confidence"}),), dense.Encoding(), STUDENT)
    nats = -Q.gather(1, TARGET_IDS[:, None])[:, 0].log()
    torch.testing.assert_close(loss.double(), P_TARGET * nats, atol=1e-5, rtol=1e-5)


def test_topk_labels_tell_the_confidence_in_a_target_that_they_do_not_keep():
    _, told = _rows((_term("forward_kl", {"kind": "confidence"}),), topk.Encoding(k=4), STUDENT)
    torch.testing.assert_close(told["forward_kl_weight_confidence"].double(), P_TARGET, atol=2e-3, rtol=2e-3)


def test_a_weight_of_a_lumped_distribution_makes_its_term_biased():
    for kind, exactness in (("entropy", "biased"), ("difficulty", "biased"), ("confidence", "lower_bound")):
        term = _term("forward_kl", {"kind": kind})
        assert term.exactness_of(TopKLabels()) == exactness
        assert term.exactness_of(DenseLabels()) == "exact"


@pytest.mark.parametrize("chunk_rows", [1, 5, N])
def test_the_fused_head_weights_rows_as_the_plain_formula_whatever_the_chunk(chunk_rows: int):
    g = torch.Generator().manual_seed(7)
    states, weight = torch.randn(N, H, generator=g).requires_grad_(), torch.randn(V, H, generator=g).requires_grad_()
    encoding = dense.Encoding()
    term = _term("forward_kl", {"kind": "entropy"}, {"kind": "position", "half_life": 2})
    part = LossPart(
        slice(0, N), encoding.encode(TEACHER, TARGET_IDS), encoding, Objective.of((term,), encoding), 0.5,
        row_weights=torch.linspace(0.5, 2, N), positions=positions_of(ROW_SEQUENCES),
    )  # fmt: skip
    found = head_loss(
        states, weight, None, TARGET_IDS, head_shape=HeadShape(), vocabulary_size=V, parts=[part], chunk_rows=chunk_rows
    )
    token = torch.linspace(0.5, 2, N).double() * WEIGHTS[0][1]() * 0.5 ** (POSITIONS / 2)
    q = (states.double() @ weight.double().T).softmax(-1)
    expected = 0.5 * (token * oracle.forward_kl(P, q)).sum()
    torch.testing.assert_close(found.loss.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, exact in zip(
        torch.autograd.grad(found.loss, (states, weight)), torch.autograd.grad(expected, (states, weight)), strict=True
    ):
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_positions_count_the_rows_before_in_the_same_sequence():
    assert torch.equal(positions_of(ROW_SEQUENCES), POSITIONS)
    assert positions_of(ROW_SEQUENCES[:0]).shape == (0,)


def test_the_threshold_of_difficulty_keeps_the_share_that_is_asked_for_and_their_mean_weight_is_one():
    schedule = schedule_of(Difficulty(keep=0.25, change=0.0))
    distances = torch.rand(2000, generator=torch.Generator().manual_seed(0)) ** 2
    for _ in range(200):
        now = schedule.arguments()
        kept = (distances >= now["threshold"]).double() / now["keep"]
        schedule.advance({VALUE: 1.0, "weight": kept.mean().item()}, 0.0)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_share_of_difficulty_falls_while_the_loss_falls_and_rises_while_it_rises():
    schedule = schedule_of(Difficulty(change=0.1, tolerance=0.05, momentum=0.0, least=0.85))
    seen = []
    for loss in (1.0, 0.98, 0.9, 0.8, 0.7, 0.9, 0.91, 1.5, 3.0, 6.0):
        schedule.advance({VALUE: loss, "weight": 1.0}, 0.0)
        seen.append(schedule.told()["keep"])
    assert seen == pytest.approx([1.0, 1.0, 0.9, 0.85, 0.85, 0.935, 0.935, 1.0, 1.0, 1.0])
    assert math.isclose(schedule.numbers["at_change"], 6.0)


def test_rows_that_a_threshold_drops_have_no_gradient():
    objective = Objective.of((_term("forward_kl", {"kind": "difficulty", "keep": 0.5}),), dense.Encoding())
    (schedule,) = objective.schedules.values()
    schedule.numbers["threshold"] = float(HELLINGER.median()) + 1e-4
    labels = dense.Encoding().encode(TEACHER, TARGET_IDS)
    gradient = oracle.gradient(
        lambda z: objective.rows(z, labels, TARGET_IDS, dense.Encoding(), positions=POSITIONS)[0], STUDENT
    )
    kept = schedule.numbers["threshold"] <= HELLINGER
    assert torch.equal(gradient.abs().sum(-1) > 0, kept)
