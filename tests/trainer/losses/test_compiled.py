"""The compiled loss against the plain one: equal values and gradients, few graphs, and a way back where it fails."""

from __future__ import annotations

from typing import Any

import loss_oracles as oracle
import pytest
import torch

from configs.losses import LOSSES
from trainer.labels import hidden, topk
from trainer.losses.compiled import CompiledRows
from trainer.losses.fused import HeadLoss, LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape

N, V, H = 40, 97, 16
ENCODINGS = {"topk": topk.Encoding(k=8), "hidden": hidden.Encoding()}
MIX = ({"loss": "forward_kl"}, {"loss": "jsd", "beta": 0.5, "token_weights": ["confidence"]}, {"loss": "cross_entropy"})
G = torch.Generator().manual_seed(2)
TEACHER_HIDDEN, TARGET_IDS = torch.randn(N, H, generator=G), torch.randint(V, (N,), generator=G)
HEAD = Head(torch.randn(V, H, generator=G), None, HeadShape(), V)


@pytest.fixture(autouse=True)
def _graphs_of_this_test_alone() -> Any:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _loss(kind: str, rows: int, compiled: CompiledRows | None, objective: Objective) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    states = torch.randn(N, H, generator=g)[:rows].requires_grad_()
    weight = torch.randn(V, H, generator=g).requires_grad_()
    encoding = ENCODINGS[kind]
    source = TEACHER_HIDDEN if encoding.needs == "hidden" else HEAD.logits(TEACHER_HIDDEN)
    labels = {name: column[:rows] for name, column in encoding.encode(source, TARGET_IDS).items()}
    part = LossPart(
        slice(0, rows), labels, encoding, objective, 0.5, HEAD, positions=torch.arange(rows), compiled=compiled
    )
    found: HeadLoss = head_loss(
        states, weight, None, TARGET_IDS[:rows], head_shape=HeadShape(), vocabulary_size=V, parts=[part], chunk_rows=16
    )
    return [found.loss.detach(), *torch.autograd.grad(found.loss, (states, weight))]


def _objective(kind: str) -> Objective:
    return Objective.of(tuple(LOSSES.validate(dict(term)) for term in MIX), ENCODINGS[kind])


def _assert_equal(kind: str, compiled: CompiledRows, objective: Objective, row_counts: tuple[int, ...]) -> None:
    for rows in row_counts:
        plain, ours = (_loss(kind, rows, one, objective) for one in (None, compiled))
        for exact, found in zip(plain, ours, strict=True):
            torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4, msg=f"{rows} rows")


@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_a_traced_loss_is_the_plain_one_with_one_graph_for_all_numbers_of_rows(kind: str):
    objective = _objective(kind)
    compiled = CompiledRows(objective, backend="aot_eager")
    _assert_equal(kind, compiled, objective, (16, 5, 40, 23, 7, 31))  # chunks of 16 and of what is left of them
    assert compiled.works
    assert _graphs() == 1
    _assert_equal(kind, compiled, objective, (17, 33))  # a chunk of one row has a graph of its own
    assert _graphs() == 2


@pytest.mark.stack
def test_a_loss_that_inductor_compiles_for_this_processor_is_the_plain_one():
    objective = _objective("hidden")
    compiled = CompiledRows(objective)
    _assert_equal("hidden", compiled, objective, (16, 40, 23))
    assert compiled.works


def test_where_compiling_fails_one_line_says_so_and_the_loss_is_the_plain_one(capsys: pytest.CaptureFixture[str]):
    def broken(graph: object, inputs: object) -> None:
        raise OSError("no compiler on this machine")

    objective = _objective("topk")
    compiled = CompiledRows(objective, backend=broken)
    _assert_equal("topk", compiled, objective, (40, 16))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "the loss cannot be compiled, and is computed without that: BackendCompilerFailed" in said
    assert "no compiler on this machine" in said


def test_an_error_of_the_loss_itself_is_no_failure_of_compiling():
    compiled = CompiledRows(_objective("topk"), backend="aot_eager")
    assert not compiled.gives_up(RuntimeError("out of memory"))
    assert compiled.works


def test_terms_whose_numbers_move_are_not_compiled():
    taid = Objective.of((oracle.term("taid"),), ENCODINGS["hidden"])
    assert CompiledRows.of(taid) is None
    assert CompiledRows.of(_objective("hidden")) is not None
