"""Every encoding times every divergence of the registries, held to what each must do. A new kind of either is a new row
or column by itself, and fails until tests/support/term_oracles.py says by its definition what it is."""

from __future__ import annotations

import itertools
from functools import partial

import loss_oracles as oracle
import pytest
import term_oracles as kit
import torch

from configs.labels import LABELS, TopK
from configs.losses import LOSSES
from trainer.labels.encoding import load_encoding
from trainer.losses.fused import LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.losses.target import TargetEvent
from trainer.losses.terms import function_of
from trainer.model.head import Head, HeadShape
from trainer.types import PairedLogProbs

N, V, H = 9, 211, 24
_G = torch.Generator().manual_seed(5)
TEACHER_HIDDEN = torch.randn(N, H, generator=_G)
HEAD = Head(torch.randn(V, H, generator=_G) * 0.7, None, HeadShape(), V)
TEACHER = TEACHER_HIDDEN @ HEAD.weight.T
STUDENT = TEACHER * 0.6 + oracle.realistic_logits(N, V, seed=3, spread=1.0)
TARGET_IDS = TEACHER.argsort(-1, descending=True)[torch.arange(N), torch.tensor([0, 0, 1, 3, 9, 20, 60, 0, 2])]
"""Some likely, some in every tail."""

CELLS = kit.cells()
CERTAIN = [(kind, loss) for kind, loss in CELLS if not kit.encoding_oracle(kind).drawn]
"""Cells whose labels are not right on average alone."""
DIVERGENCES = kit.divergences()


class Cell:
    """One cell of the matrix with labels of N rows."""

    def __init__(self, kind: str, loss: str, *, temperature: float = 1.0, **parameters: object) -> None:
        self.of_labels, self.of_term = kit.encoding_oracle(kind), kit.term_oracle(loss)
        given = {"kind": kind, "temperature": temperature, **self.of_labels.parameters, **parameters}
        self.encoding = load_encoding(LABELS.validate(given))
        self.objective = Objective.of((self.of_term.term(loss),), self.encoding)
        self.ids = self.of_labels.ids(TEACHER / temperature, STUDENT, TARGET_IDS)
        self.labels = self.encode(TEACHER_HIDDEN, TEACHER)

    def encode(self, hidden: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        given = {"given_ids": self.ids} if self.encoding.takes_ids else {}
        if self.encoding.needs_row_keys:
            given["row_keys"] = torch.arange(N)
        return self.encoding.encode(logits if self.encoding.needs == "logits" else hidden, TARGET_IDS, **given)

    def rows(self, logits: torch.Tensor, labels: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        found, _ = self.objective.rows(logits, labels or self.labels, TARGET_IDS, self.encoding, HEAD)
        return found

    def expected(self, logits: torch.Tensor) -> torch.Tensor:
        t = self.encoding.temperature
        p, q = (TEACHER.double() / t).softmax(-1), (logits.double() / t).softmax(-1)
        return t**2 * kit.events(self.of_term, p, q, TARGET_IDS, self.ids)

    def part(self, rows: slice = slice(0, N)) -> LossPart:
        labels = {name: column[rows] for name, column in self.labels.items()}
        return LossPart(rows, labels, self.encoding, self.objective, 0.5, HEAD)


def fused(parts: list[LossPart], *, chunk_rows: int, order: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Loss and gradients of the student's hidden states and head."""
    g = torch.Generator().manual_seed(8)
    states, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) * 0.5
    order = torch.arange(N) if order is None else order
    states, weight = states[order].requires_grad_(), weight.requires_grad_()
    found = head_loss(
        states, weight, None, TARGET_IDS[order], head_shape=HeadShape(), vocabulary_size=V, parts=parts,
        chunk_rows=chunk_rows,
    )  # fmt: skip
    return [found.loss.detach(), *torch.autograd.grad(found.loss, (states, weight))]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def test_every_term_and_every_encoding_of_the_registries_has_an_oracle():
    for loss in DIVERGENCES:
        kit.term_oracle(loss)
    for kind in kit.kinds():
        kit.encoding_oracle(kind)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["64", "32"])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_value_and_gradient_of_a_term_are_those_of_its_definition(loss: str, dtype: torch.dtype, tolerance: float):
    of_term = kit.term_oracle(loss)
    p = TEACHER.double().softmax(-1)

    def rows(logits: torch.Tensor) -> torch.Tensor:
        scores = logits.to(dtype)
        teacher = TEACHER.double().log_softmax(-1).to(dtype)
        pair = PairedLogProbs(scores.log_softmax(-1), teacher, exhaustive=True, student_scores=scores)
        target = TargetEvent.of(pair, scores, TARGET_IDS, temperature=1.0)
        term = of_term.term(loss)
        given = (pair, target) if of_term.sees_target else (pair,)
        found = function_of(term)(*given, **(term.parameters() if of_term.arguments is None else of_term.arguments))
        return found[0] if term.tells else found

    def expected(logits: torch.Tensor) -> torch.Tensor:
        return of_term.rows(p, logits.softmax(-1), TARGET_IDS)

    student = STUDENT.double()
    close(rows(student), expected(student), tolerance)
    close(oracle.gradient(rows, student), oracle.gradient(expected, student), tolerance)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(("kind", "loss"), CERTAIN)
def test_value_and_gradient_of_a_cell_are_those_over_its_events(kind: str, loss: str, temperature: float):
    cell = Cell(kind, loss, temperature=temperature)
    tolerance = cell.of_labels.rounds_to
    close(cell.rows(STUDENT), cell.expected(STUDENT), tolerance)
    gradient = oracle.gradient(cell.rows, STUDENT)
    close(gradient, oracle.gradient(cell.expected, STUDENT.double()), tolerance)
    assert gradient.sum(-1).abs().max() < 1e-4, "a softmax does not change where all logits move alike"


@pytest.mark.parametrize(("kind", "loss"), CERTAIN)
def test_a_student_equal_to_its_teacher_is_at_the_noise_floor(kind: str, loss: str):
    cell = Cell(kind, loss)
    tolerance = 3 * cell.of_labels.rounds_to
    if loss == "tvd":
        tolerance = max(tolerance, 1e-4)  # not smooth there: any rounding has a gradient of its own size
        assert cell.rows(TEACHER).abs().max() < tolerance
        return
    assert cell.rows(TEACHER).abs().max() < tolerance
    assert oracle.gradient(cell.rows, TEACHER).abs().max() < tolerance


@pytest.mark.parametrize(("kind", "loss"), CERTAIN)
def test_labels_shifted_by_one_row_are_seen(kind: str, loss: str):
    cell = Cell(kind, loss)
    near = TEACHER + 0.02 * STUDENT
    shifted = {name: column.roll(1, 0) for name, column in cell.labels.items()}
    right, wrong = cell.rows(near).mean(), cell.rows(near, shifted).mean()
    assert wrong > 10 * right, (right, wrong)


@pytest.mark.parametrize("loss", [loss for kind, loss in CELLS if kind == "topk" and loss != "lsm"])
def test_topk_labels_of_all_ids_give_the_value_over_the_vocabulary_and_fewer_never_more_where_it_is_a_bound(loss: str):
    full = Cell("dense", loss).rows(STUDENT)
    values = [Cell("topk", loss, k=k).rows(STUDENT) for k in (2, 8, 32, 128, V)]
    torch.testing.assert_close(values[-1], full, atol=5e-3, rtol=1e-2)
    if LOSSES.parameters_of(loss).exactness_with(TopK) == "lower_bound":
        for less, more in itertools.pairwise(values):
            assert (less <= more + 5e-3 + 0.01 * full).all()


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_hidden_labels_give_what_dense_ones_give(loss: str):
    hidden, dense = Cell("hidden", loss), Cell("dense", loss)
    close(hidden.rows(STUDENT), dense.rows(STUDENT), 1e-5)
    close(oracle.gradient(hidden.rows, STUDENT), oracle.gradient(dense.rows, STUDENT), 1e-5)


@pytest.mark.parametrize(("kind", "loss"), CELLS)
def test_chunks_packing_and_a_split_into_tasks_change_nothing(kind: str, loss: str):
    cell = Cell(kind, loss)
    whole = fused([cell.part()], chunk_rows=N)
    order = torch.arange(N).flip(0)
    packed = Cell(kind, loss)
    packed.labels = {name: column[order] for name, column in cell.labels.items()}
    split = [cell.part(slice(0, 4)), cell.part(slice(4, N))]
    others = {
        "chunks of one row": fused([cell.part()], chunk_rows=1),
        "chunks of four": fused([cell.part()], chunk_rows=4),
        "two tasks": fused(split, chunk_rows=N),
        "packed the other way round": fused([packed.part()], chunk_rows=N, order=order),
    }
    others["packed the other way round"][1] = others["packed the other way round"][1][order]
    for name, found in others.items():
        for actual, expected in zip(found, whole, strict=True):
            scale = expected.abs().max().clamp(min=1.0)
            message = partial("{}: {}".format, name)
            torch.testing.assert_close(actual, expected, atol=2e-5 * scale, rtol=1e-4, msg=message)


def test_ids_outside_the_support_of_lsm_get_a_gradient_of_exactly_zero():
    for kind in ("topk", "hidden", "dense"):
        gradient = oracle.gradient(Cell(kind, "lsm").rows, STUDENT)
        kept = TEACHER.topk(7).indices
        assert (gradient.scatter(1, kept, 0.0) == 0).all()
        assert (gradient.gather(1, kept) != 0).all()


@pytest.mark.parametrize(("kind", "loss"), CELLS)
def test_prompts_tool_results_and_padding_have_a_gradient_of_exactly_zero(kind: str, loss: str):
    """A text of 20 tokens: prompt, answer, tool result, answer, padding."""
    cell = Cell(kind, loss)
    mask = torch.zeros(20, dtype=torch.bool)
    mask[4:9] = mask[13:17] = True
    states = torch.randn(20, H, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(4)) * 0.5
    head_loss(
        states[mask], weight, None, TARGET_IDS, head_shape=HeadShape(), vocabulary_size=V, parts=[cell.part()],
        chunk_rows=4,
    ).loss.backward()  # fmt: skip
    assert (states.grad[~mask] == 0).all()
    assert (states.grad[mask].abs().sum(1) > 0).all()
