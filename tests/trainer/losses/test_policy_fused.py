"""Terms on text that the student wrote, through both passes of the head: as by their rows in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toy_rollouts as toy
from toy_rollouts import BEFORE, STUDENT, TEACHER, Estimator

from configs.labels import LABELS
from configs.losses import LOSSES
from trainer.labels.encoding import load_encoding
from trainer.losses.compiled import CompiledRows
from trainer.losses.fused import LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape
from trainer.types import WRITTEN

CELLS = [
    ("policy_gradient", "token", {"discount": 0.7}),
    ("policy_gradient", "topk", {"discount": 1.0, "reward_weight": 0.4}),
    ("policy_gradient", "hidden", {"discount": 0.7}),
    ("policy_gradient", "given_ids", {}),
    ("minillm", "nucleus", {}),
    ("minillm", "dense", {}),
    ("k2", "token", {}),
]
REWARDS = tuple(1.0 - 0.5 * len(text) for text in toy.TEXTS)


def estimator(loss: str, kind: str, parameters: dict[str, float]) -> Estimator:
    return replace(Estimator.of(loss, kind, written=BEFORE, **parameters), rewards=REWARDS)


def fused(
    made: Estimator, *, chunk_rows: int = 500, backwards: bool = False, cut: int = 0, compiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, its gradient by the table of the student), each text with its chance as a weight. `backwards`: the texts
    in the other order; `cut`: those before this one are a part of their own."""
    order = torch.arange(len(toy.TEXTS))
    order = order.flip(0) if backwards else order
    rows = torch.cat([(text == toy.OF_TEXT).nonzero()[:, 0] for text in order])
    encoding = load_encoding(LABELS.validate({"kind": made.kind, **toy.LABELS_OF[made.kind]}))
    objective = Objective.of((made.term,), encoding)
    given = {"given_ids": STUDENT[toy.PLACES].topk(encoding.k).indices} if encoding.takes_ids else {}
    labels = encoding.encode(TEACHER[toy.PLACES].float(), toy.TOKENS, **given)
    columns = {WRITTEN: toy.logprobs(made.written)} | made.columns(objective)
    weights = toy.chances(made.written)[toy.OF_TEXT]
    first = int((toy.OF_TEXT[rows] < cut).sum()) if not backwards else 0
    parts = [
        LossPart(
            part,
            {name: column[rows[part]] for name, column in labels.items()},
            encoding,
            objective,
            scale=1.0,
            teacher_head=Head(torch.eye(toy.V), None, HeadShape(), toy.V),
            row_weights=weights[rows[part]].float(),
            row_sequences=torch.unique_consecutive(toy.OF_TEXT[rows[part]], return_inverse=True)[1],
            columns={name: column[rows[part]].float() for name, column in columns.items()},
            compiled=CompiledRows(objective, backend="aot_eager") if compiled else None,
        )
        for part in ([slice(0, first)] if first else []) + [slice(first, len(rows))]
    ]
    weight = STUDENT.T.float().contiguous().requires_grad_()
    hidden = torch.eye(len(toy.BEGINNINGS))[toy.PLACES[rows]]
    found = head_loss(
        hidden, weight, None, toy.TOKENS[rows], head_shape=HeadShape(), vocabulary_size=toy.V, parts=parts,
        chunk_rows=chunk_rows,
    )  # fmt: skip
    return found.loss.detach(), torch.autograd.grad(found.loss, weight)[0].T


@pytest.mark.parametrize(("loss", "kind", "parameters"), CELLS)
def test_chunks_packing_and_parts_give_the_gradient_of_the_rows(loss: str, kind: str, parameters: dict[str, float]):
    made = estimator(loss, kind, parameters)
    expected = made.mean()
    cuts = {"whole": {}, "chunks": {"chunk_rows": 7}, "backwards": {"backwards": True, "chunk_rows": 31}}
    for name, how in {**cuts, "two parts": {"cut": 11, "chunk_rows": 9}}.items():
        value, gradient = fused(made, **how)
        torch.testing.assert_close(gradient.double(), expected, atol=3e-6, rtol=1e-4, msg=f"{name}: {loss}, {kind}")
        assert value.item() == pytest.approx(made.value(), rel=1e-4)


def test_columns_of_the_row_before_are_seen():
    made = estimator("policy_gradient", "token", {"discount": 0.7})
    moved = replace(made, written=BEFORE.roll(1, 1))
    assert (fused(moved)[1] - fused(made)[1]).abs().max() > 0.01


@pytest.mark.parametrize(("loss", "kind", "parameters"), [CELLS[0], CELLS[1], CELLS[2], CELLS[6]])
def test_compiled_rows_are_the_plain_ones(loss: str, kind: str, parameters: dict[str, float]):
    import torch._dynamo

    torch._dynamo.reset()
    made = estimator(loss, kind, parameters)
    for plain, ours in zip(fused(made), fused(made, compiled=True), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()


def test_text_without_its_log_probabilities_is_an_error_by_name():
    objective = Objective.of((LOSSES.validate("k2"),), load_encoding(LABELS.validate("token")))
    labels = {"logprob": torch.zeros(2, 1)}
    with pytest.raises(ValueError, match="k2 needs the column rollout_logprobs"):
        objective.rows(torch.zeros(2, toy.V), labels, torch.zeros(2, dtype=torch.int64), None)
