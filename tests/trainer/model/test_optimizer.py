"""The learning rate against values worked out by hand, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch

from configs.schema import Optimizer
from trainer.model.optimizer import learning_rate, parameter_groups


def test_the_rate_rises_over_the_warmup_and_falls_to_the_final_fraction() -> None:
    settings = Optimizer(learning_rate=2.0, warmup_steps=4, schedule="linear", final_fraction=0.1)
    rates = [learning_rate(step, settings=settings, total_steps=10) for step in range(1, 11)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:] == pytest.approx([1.7, 1.4, 1.1, 0.8, 0.5, 0.2])


def test_the_cosine_is_halfway_in_the_middle() -> None:
    settings = Optimizer(learning_rate=1.0, schedule="cosine", final_fraction=0.0)
    assert learning_rate(5, settings=settings, total_steps=10) == pytest.approx(0.5)
    assert learning_rate(10, settings=settings, total_steps=10) == pytest.approx(0.0)
    assert learning_rate(1, settings=settings, total_steps=10) == pytest.approx((1 + math.cos(math.pi / 10)) / 2)


def test_a_constant_rate_stays_at_the_peak_and_warmup_may_fill_the_run() -> None:
    constant = Optimizer(learning_rate=3.0, schedule="constant")
    assert {learning_rate(step, settings=constant, total_steps=7) for step in range(1, 8)} == {3.0}
    warm = Optimizer(learning_rate=3.0, warmup_steps=7)
    assert learning_rate(7, settings=warm, total_steps=7) == pytest.approx(3.0)


def test_norms_and_biases_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    layer[2].requires_grad_(False)
    matrices, vectors = parameter_groups(layer.parameters(), settings=Optimizer(weight_decay=0.1))
    assert [p.dim() for p in matrices["params"]] == [2]
    assert matrices["weight_decay"] == 0.1
    assert [p.dim() for p in vectors["params"]] == [1, 1, 1]
    assert vectors["weight_decay"] == 0.0
    (everything,) = parameter_groups(layer.parameters(), settings=Optimizer())
    assert len(everything["params"]) == 4
