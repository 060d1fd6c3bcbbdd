"""Heads against the logits of real architectures."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from transformers import AutoConfig

from trainer.model.head import Head, HeadShape

V = 283


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_head_gives_the_models_own_logits_without_the_padding(family: str, tied: bool, dtype: torch.dtype):
    model = tiny_model(family, tied=tied, dtype=dtype)
    ids = torch.randint(3, V, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
        expected = model(ids).logits[0, :, :V].float()
    head = Head(model.lm_head.weight, None, HeadShape.of_config(model.config), V)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(head.logits(states), expected, atol=tolerance, rtol=tolerance)


def test_the_soft_cap_is_what_makes_gemma_right():
    model = tiny_model("gemma2")
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    capped = Head(model.lm_head.weight, None, HeadShape.of_config(model.config), V).logits(states)
    plain = Head(model.lm_head.weight, None, HeadShape(), V).logits(states)
    assert capped.abs().max() <= 5.0
    assert plain.abs().max() > 6.0


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("llama", {}, HeadShape()),
        ("gemma2", {"final_logit_softcapping": 30.0}, HeadShape(soft_cap=30.0)),
        ("granite", {"logits_scaling": 8.0}, HeadShape(scale=0.125)),
        ("cohere", {"logit_scale": 0.0625}, HeadShape(scale=0.0625)),
        ("hyperclovax", {"logits_scaling": 0.25}, HeadShape(scale=0.25)),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, HeadShape(scale=0.5)),
    ],
)
def test_the_shape_is_read_from_the_config_of_the_architecture(kind: str, changes: dict, expected: HeadShape):
    assert HeadShape.of_config(AutoConfig.for_model(kind, **changes)) == expected


def test_a_bias_is_added_and_its_padding_is_not():
    weight, bias, states = torch.randn(10, 4), torch.randn(10), torch.randn(3, 4)
    logits = Head(weight, bias, HeadShape(), 8).logits(states)
    torch.testing.assert_close(logits, states @ weight[:8].T + bias[:8])
