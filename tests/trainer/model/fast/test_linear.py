"""The body's products on CPUs: same values and gradients as torch's own, on the layers that are meant and no others."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from trainer.model.fast.linear import use_fast_products

HOST = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 31, 32, 45, 96])
def test_hidden_states_and_gradients_equal_the_plain_model(family: str, length: int) -> None:
    plain = tiny_model(family).model
    fast = copy.deepcopy(plain)
    assert use_fast_products(fast, device=HOST, dtype=torch.float32) == 14  # 7 a layer
    ids = torch.randint(3, 280, (1, length), generator=torch.Generator().manual_seed(length))
    ours, theirs = (body(ids).last_hidden_state for body in (fast, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for output in (ours, theirs):
        output.square().sum().backward()
    theirs_by_name = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        expected = theirs_by_name[name].grad
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), msg=name
        )


def test_a_layer_with_bias_and_a_frozen_weight() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(16, 24))
    inputs = torch.randn(2, 40, 16, requires_grad=True)
    expected = layer(inputs)
    (by_inputs,) = torch.autograd.grad(expected.sum(), inputs)
    use_fast_products(layer, device=HOST, dtype=torch.float32)
    layer[0].weight.requires_grad_(False)
    result = layer(inputs)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    torch.testing.assert_close(inputs.grad, by_inputs)
    assert layer[0].weight.grad is None
    assert torch.equal(layer[0].bias.grad, torch.full((24,), 80.0))


@pytest.mark.parametrize("rows", [40, 64])  # with rows of padding, and without
def test_what_a_layer_returns_may_be_changed_in_place(rows: int) -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False))
    fast = copy.deepcopy(plain)
    use_fast_products(fast, device=HOST, dtype=torch.float32)
    inputs = torch.randn(1, rows, 16)
    for layer in (plain, fast):
        outputs = layer(inputs).clamp_(min=-0.5, max=0.5)  # as OLMo's clip_qkv does
        outputs.square().sum().backward()
    torch.testing.assert_close(fast[0].weight.grad, plain[0].weight.grad)


@pytest.mark.parametrize("length", [32, 45])
def test_bfloat16_is_as_near_to_the_exact_model_as_torchs_own_product(length: int) -> None:
    plain = tiny_model(dtype=torch.bfloat16).model
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).to(torch.float64)
    assert use_fast_products(fast, device=HOST, dtype=torch.bfloat16) == 14
    ids = torch.randint(3, 280, (1, length), generator=torch.Generator().manual_seed(length))
    for body in (fast, plain, exact):
        body(ids).last_hidden_state.square().sum().backward()
    theirs, truth = dict(plain.named_parameters()), dict(exact.named_parameters())
    for name, parameter in fast.named_parameters():
        off = float((parameter.grad - truth[name].grad).norm())
        assert off <= 1.5 * float((theirs[name].grad - truth[name].grad).norm()) + 1e-6, name


def test_bfloat16_meets_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False)).to(torch.bfloat16)
    use_fast_products(layer, device=HOST, dtype=torch.bfloat16)
    rows: set[int] = set()
    product = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows.update({a.shape[0], a.shape[1]} - {16, 24})
        return product(a, b)

    monkeypatch.setattr(torch, "mm", counted)
    for length in range(65, 97):
        inputs = torch.randn(length, 16, dtype=torch.bfloat16, requires_grad=True)
        assert layer(inputs).shape == (length, 24)
        layer(inputs).sum().backward()
    assert rows == {96}


def test_other_dtypes_keep_their_own_product() -> None:
    assert use_fast_products(tiny_model(dtype=torch.float16).model, device=HOST, dtype=torch.float16) == 0
