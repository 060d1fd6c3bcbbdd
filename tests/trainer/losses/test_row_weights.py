"""Weights of single answers, from a sequence through packing into the loss: against a loop over tokens in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from configs.losses import CrossEntropy
from trainer.loop.packing import pack
from trainer.losses.fused import LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.model.head import HeadShape
from trainer.types import Sequence, Unit

V, H = 23, 8


def sequence(name: str, length: int, answers: dict[tuple[int, int], float], weight: float = 1.0) -> Sequence:
    """`answers`: the weight of the rows of each span."""
    mask, weights = np.zeros(length, dtype=bool), np.zeros(length, dtype=np.float32)
    for (start, stop), of_answer in answers.items():
        mask[start:stop], weights[start:stop] = True, of_answer
    ids = (np.arange(length) * 5 + len(name)) % V
    return Sequence(name, ids.astype(np.int32), mask, "dataset", weight=weight, row_weights=weights)


def fused(sequences: list[Sequence], states: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient by the head."""
    batch = pack((Unit("u", tuple(sequences)),), tuple((0, i) for i in range(len(sequences))), [None])
    (part,) = batch.parts
    head = head.clone().requires_grad_(True)
    objective = Objective.of((CrossEntropy(),), None)
    given = LossPart(part.rows, {}, None, objective, scale=0.25, row_weights=part.row_weights)
    loss = head_loss(
        states[batch.loss_rows], head, None, batch.target_ids,
        head_shape=HeadShape(), vocabulary_size=V, parts=[given], chunk_rows=4,
    ).loss  # fmt: skip
    return loss, torch.autograd.grad(loss, head)[0]


def token_by_token(
    sequences: list[Sequence], states: torch.Tensor, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    head = head.double().requires_grad_(True)
    loss, at = torch.zeros((), dtype=torch.float64), 0
    for one in sequences:
        for i in range(one.num_tokens - 1):
            if one.loss_mask[i]:
                logprobs = torch.log_softmax(states[at + i].double() @ head.T, dim=0)
                loss = loss - 0.25 * one.weight * float(one.row_weights[i]) * logprobs[one.token_ids[i + 1]]
        at += one.num_tokens
    return loss, torch.autograd.grad(loss, head)[0]


def test_each_row_counts_with_the_weight_of_its_answer_and_of_its_sequence() -> None:
    g = torch.Generator().manual_seed(4)
    sequences = [
        sequence("a", 12, {(2, 5): 0.5, (7, 11): 2.0}),
        sequence("bb", 9, {(1, 8): 1.0}, weight=0.1),
        sequence("ccc", 7, {(3, 6): 0.25}, weight=4.0),
    ]
    states, head = torch.randn(28, H, generator=g), torch.randn(V, H, generator=g)
    expected = token_by_token(sequences, states, head)
    for found, exact in zip(fused(sequences, states, head), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    moved = [dataclasses.replace(one, row_weights=np.roll(one.row_weights, 1)) for one in sequences]
    assert (fused(moved, states, head)[0] - expected[0]).abs().item() > 1e-2, "weights of other rows are seen"


def test_the_weight_of_an_only_answer_is_the_weight_of_its_row() -> None:
    g = torch.Generator().manual_seed(5)
    states, head = torch.randn(9, H, generator=g), torch.randn(V, H, generator=g)
    on_answer = sequence("a", 9, {(2, 8): 0.5})
    on_row = dataclasses.replace(on_answer, row_weights=None, weight=0.5)
    for one, other in zip(fused([on_answer], states, head), fused([on_row], states, head), strict=True):
        assert torch.equal(one, other)
