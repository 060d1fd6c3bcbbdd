"""KL over the candidates of a prompt, through both passes of the head, against autograd in float64 over the formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from configs.losses import ListwiseKl, ScoredListwiseKl, Term
from trainer.labels.token import Encoding
from trainer.losses.fused import LossPart, head_loss
from trainer.losses.listwise import listwise_kl, scored_listwise_kl
from trainer.losses.objective import Objective
from trainer.losses.terms import SequenceScores
from trainer.model.head import HeadShape

LENGTHS = (9, 4, 1, 12, 8, 7, 3)
N, H, V = sum(LENGTHS), 16, 101
ROW_SEQUENCES = torch.repeat_interleave(torch.arange(7), torch.tensor(LENGTHS))
GROUPS = ((1, 0, 4), (3, 2), (5, 6))
SCORES = (0.5, -1.0, 3.0, 2.0, 0.0, 7.0, 6.5)
TERMS = (
    ListwiseKl(temperature=0.7),
    ListwiseKl(per_token=False, temperature=4.0),
    ScoredListwiseKl(temperature=0.3, score_temperature=2.0),
    ScoredListwiseKl(per_token=False),
)


def _tensors() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) / 2
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randn(N, V, generator=g), torch.randint(
        V, (N,), generator=g
    )  # fmt: skip


def _ours(term: Term, *, chunk_rows: int = 7, shift: int = 0, scores: tuple = SCORES) -> list[torch.Tensor]:
    hidden, weight, teacher, ids = _tensors()
    part = LossPart(
        rows=slice(0, N),
        labels=Encoding().encode(teacher.roll(shift, 0), ids),
        encoding=Encoding(),
        objective=Objective.of((term,), Encoding()),
        scale=1 / N,
        group_scale=1 / len(GROUPS),
        row_sequences=ROW_SEQUENCES,
        groups=GROUPS,
        rewards=scores,
    )
    made = head_loss(
        hidden, weight, None, ids, head_shape=HeadShape(), vocabulary_size=V, parts=[part], chunk_rows=chunk_rows
    )
    return [made.loss.detach(), *torch.autograd.grad(made.loss, (hidden, weight))]


def _brute_force(term: Term) -> list[torch.Tensor]:
    """Candidate by candidate."""
    hidden, weight, teacher, ids = _tensors()
    student, taught = (
        rows.log_softmax(1).gather(1, ids[:, None])[:, 0]
        for rows in (hidden.double() @ weight.double().T, teacher.double())
    )
    loss = torch.zeros((), dtype=torch.float64)
    for group in GROUPS:
        q, p = [], []
        for one in group:
            own = index = one == ROW_SEQUENCES
            length = index.sum() if term.per_token else 1
            q.append(student[own].sum() / length / term.temperature)
            said = SCORES[one] / getattr(term, "score_temperature", 1.0)
            p.append(
                torch.tensor(said, dtype=torch.float64)
                if isinstance(term, ScoredListwiseKl)
                else taught[own].sum() / length / term.temperature
            )
        p, q = (torch.stack(one).exp() / torch.stack(one).exp().sum() for one in (p, q))
        loss = loss + sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True)) / len(GROUPS)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def _assert_equal(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("term", TERMS, ids=repr)
@pytest.mark.parametrize("chunk_rows", [1, 7, 512])
def test_value_and_gradients_equal_the_whole_formula(term: Term, chunk_rows: int) -> None:
    _assert_equal(_ours(term, chunk_rows=chunk_rows), _brute_force(term))
    wrong = {"scores": SCORES[1:] + SCORES[:1]} if isinstance(term, ScoredListwiseKl) else {"shift": 1}
    with pytest.raises(AssertionError):
        _assert_equal(_ours(term, chunk_rows=chunk_rows, **wrong), _brute_force(term))


def _scores(student: list[float], reference: list[float] | None, rewards: tuple = ()) -> SequenceScores:
    made = [None if one is None else torch.tensor(one, dtype=torch.float64) for one in (student, reference)]
    lengths = torch.tensor([2, 4, 1][: len(student)])
    return SequenceScores(*made, num_rows=lengths, rewards=rewards, groups=((0, 1, 2),))


def test_the_gradient_is_the_difference_of_both_distributions_and_none_where_all_move_alike() -> None:
    given = _scores([-2.0, -6.0, -1.0], [-1.0, -9.0, -2.0])
    student = given.student.clone().requires_grad_()
    value = listwise_kl(replace(given, student=student), per_token=False, temperature=2.0)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    p, q = (torch.softmax(one / 2.0, 0) for one in (given.reference, given.student))
    torch.testing.assert_close(gradient, (q - p) / 2.0)
    assert abs(gradient.sum().item()) < 1e-12
    alike = replace(given, student=given.reference - 5.0)
    assert listwise_kl(alike, per_token=False, temperature=2.0).item() == pytest.approx(0, abs=1e-12)
    assert listwise_kl(alike, per_token=True, temperature=2.0).item() > 1e-3  # by token the lengths tell


def test_equal_scores_are_a_uniform_target_and_an_absent_candidate_counts_for_nothing() -> None:
    given = _scores([-2.0, -8.0, -3.0], None, (4.0, 4.0, 4.0))
    value = scored_listwise_kl(given, per_token=True, temperature=1.0, score_temperature=1.0).item()
    q = torch.softmax(torch.tensor([-1.0, -2.0, -3.0]).double(), 0)
    assert value == pytest.approx(-math.log(3) - q.log().mean().item())
    uneven = replace(given, groups=((0, 1, 2), (0, 1)))
    both = scored_listwise_kl(uneven, per_token=True, temperature=1.0, score_temperature=1.0)
    alone = replace(given, groups=((0, 1),))
    assert both[0].item() == pytest.approx(value)
    assert both[1] == scored_listwise_kl(alone, per_token=True, temperature=1.0, score_temperature=1.0)[0]
