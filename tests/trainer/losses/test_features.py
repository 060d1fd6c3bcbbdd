"""Distances between states, against their definitions in float64 element by element, and closed-form gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from configs.losses import Features
from trainer.losses import features as module
from trainer.losses.features import features, mmd

N, H = 7, 12
_G = torch.Generator().manual_seed(4)
TEACHER = torch.randn(N, H, generator=_G, dtype=torch.float64) * torch.linspace(0.2, 3, H)
STUDENT = 0.7 * TEACHER + 0.4 * torch.randn(N, H, generator=_G, dtype=torch.float64)
ROOT = lambda row: math.sqrt(sum(x * x for x in row) / len(row) + 1e-6)  # noqa: E731


def _term(distance: str, **changes: object) -> Features:
    return Features(distance=distance, student_layer=0, teacher_layer=0, **changes)


def _rows(term: Features, student: torch.Tensor, teacher: torch.Tensor = TEACHER) -> torch.Tensor:
    return features(student, teacher, **term.parameters())


def _by_definition(term: Features, student: list[float], teacher: list[float]) -> float:
    """Of one row."""
    if term.normalised:
        student, teacher = ([x / ROOT(row) for x in row] for row in (student, teacher))
    pairs = list(zip(student, teacher, strict=True))
    if term.distance == "l2":
        return sum((s - t) ** 2 for s, t in pairs) / H
    if term.distance == "l1":
        return sum(abs(s - t) for s, t in pairs) / H
    if term.distance == "cosine":
        return 1 - sum(s * t for s, t in pairs) / math.dist(student, [0] * H) / math.dist(teacher, [0] * H)
    exp = [[math.exp(x / term.temperature) for x in row] for row in (student, teacher)]
    q, p = ([x / sum(row) for x in row] for row in exp)
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


ALONE = [_term(name, normalised=flag) for name in ("l2", "l1", "cosine", "ce") for flag in (True, False)]
ALONE.append(_term("ce", temperature=2.5))


@pytest.mark.parametrize("term", ALONE, ids=lambda term: f"{term.distance}-{term.normalised}-{term.temperature:g}")
def test_each_row_has_the_value_and_the_gradient_of_its_definition(term: Features) -> None:
    given = zip(STUDENT.tolist(), TEACHER.tolist(), strict=True)
    expected = torch.tensor([_by_definition(term, s, t) for s, t in given], dtype=torch.float64)
    torch.testing.assert_close(_rows(term, STUDENT), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(_rows(term, STUDENT.float()).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(_rows(term, STUDENT, TEACHER.roll(1, 0)), expected, rtol=1e-3, atol=1e-3)
    leaf = STUDENT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_rows(term, leaf).sum(), leaf)
    steps = [1e-6 * torch.eye(N * H, dtype=torch.float64)[i].view(N, H) for i in range(N * H)]
    slopes = [(_rows(term, STUDENT + d).sum() - _rows(term, STUDENT - d).sum()) / 2e-6 for d in steps]
    torch.testing.assert_close(gradient.flatten(), torch.stack(slopes), rtol=1e-5, atol=1e-7)


def test_the_gradients_that_have_a_closed_form_have_it() -> None:
    leaf = STUDENT.clone().requires_grad_()
    for term, expected in (
        (_term("l2", normalised=False), 2 * (STUDENT - TEACHER) / H),
        (_term("l1", normalised=False), (STUDENT - TEACHER).sign() / H),
        (_term("ce", normalised=False, temperature=2.0), (STUDENT / 2).softmax(-1) / 2 - (TEACHER / 2).softmax(-1) / 2),
    ):
        torch.testing.assert_close(torch.autograd.grad(_rows(term, leaf).sum(), leaf)[0], expected)


def test_equal_states_are_at_the_floor_and_only_the_student_has_a_gradient() -> None:
    for term in (*ALONE, _term("mmd")):
        student, teacher = (TEACHER.clone().requires_grad_() for _ in range(2))
        value = _rows(term, student, teacher)
        own, none = torch.autograd.grad(value.sum(), (student, teacher), allow_unused=True)
        assert none is None
        floor = 0.0
        if term.distance == "ce":
            p = (module._normalised(TEACHER) if term.normalised else TEACHER).div(term.temperature).softmax(-1)
            floor = -(p * p.log()).sum(-1)
        torch.testing.assert_close(value, torch.zeros(N, dtype=torch.float64) + floor, rtol=1e-9, atol=1e-12)
        assert own.abs().max() < 1e-9, term


def test_mmd_is_the_u_statistic_over_all_pairs_of_rows() -> None:
    both = torch.cat([STUDENT, TEACHER])
    squares = sorted(float((a - b).square().sum()) for a, b in itertools.permutations(both, 2))
    median = squares[(len(squares) - 1) // 2]
    kernel = lambda a, b: sum(math.exp(-float((a - b).square().sum()) / median / c) for c in (0.25, 0.5, 1, 2, 4)) / 5  # noqa: E731
    total = sum(
        kernel(STUDENT[i], STUDENT[j])
        + kernel(TEACHER[i], TEACHER[j])
        - kernel(STUDENT[i], TEACHER[j])
        - kernel(STUDENT[j], TEACHER[i])
        for i, j in itertools.permutations(range(N), 2)
    )
    assert mmd(STUDENT, TEACHER).item() == pytest.approx(total / (N * (N - 1)), rel=1e-9)
    apart = mmd(STUDENT + 3.0, TEACHER).item()
    assert apart > 5 * mmd(STUDENT, TEACHER).item()


def test_mmd_of_one_distribution_is_zero_on_average_and_looks_at_some_of_many_rows() -> None:
    g = torch.Generator().manual_seed(0)
    found = torch.stack([mmd(torch.randn(20, 4, generator=g), torch.randn(20, 4, generator=g)) for _ in range(400)])
    assert abs(found.mean()) < 3 * found.std() / 20
    assert (found < 0).any()
    for rows in (0, 1):
        leaf = torch.randn(rows, 4, requires_grad=True)
        value = mmd(leaf, torch.randn(rows, 4))
        assert value == 0
        value.backward()
    assert module._spread(2000, torch.device("cpu")).tolist() == [i * 2000 // 512 for i in range(512)]
    assert module._spread(3, torch.device("cpu")).tolist() == [0, 1, 2]
