"""Linear layers of the student's body on CPUs, where the default product may cost twice what it could.

`torch.nn.functional.linear` in float32 goes to MKL, which on AMD processors takes an older code path; oneDNN does not
(`trainer/model/fast/libraries.py` measures both). In bfloat16 oneDNN multiplies anyway, and writes code for every
number of rows that it meets: milliseconds and a megabyte each, more than a small product itself takes. So rows are
whole there too. Elsewhere the layers stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.model.fast.product import matmul_nt, whole_rows

FEWEST_ROWS = 32
"""Below, reading the weight is the cost, and padding to whole rows would only add work."""


def use_fast_products(body: torch.nn.Module, *, device: torch.device, dtype: torch.dtype) -> int:
    """Give every `torch.nn.Linear` of `body` a forward through `matmul_nt`; returns how many were changed.

    Weights, names and hooks stay, so sharding, adapters and checkpoints see the same module.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return 0
    layers = [module for module in body.modules() if type(module) is torch.nn.Linear]
    for layer in layers:
        layer.forward = _Forward(layer)
    return len(layers)


class _Forward:
    """Bound to one layer; an object and not a closure, so that modules can be copied."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._layer = layer

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        if inputs.shape[:-1].numel() < FEWEST_ROWS:
            return torch.nn.functional.linear(inputs, weight, bias)
        outputs = _Product.apply(inputs.flatten(0, -2), weight).unflatten(0, inputs.shape[:-1])
        return outputs if bias is None else outputs + bias


class _Product(torch.autograd.Function):
    """inputs [n, k], weight [m, k] -> [n, m]."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        # Cut in place: a view of the product could not be changed in place by whoever gets it, and the gradient of one
        # is filled with zeros before it is copied.
        return matmul_nt(whole_rows(inputs), weight).resize_(inputs.shape[0], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        grad = whole_rows(grad)
        grad_inputs = matmul_nt(grad, weight.t())[: inputs.shape[0]] if ctx.needs_input_grad[0] else None
        grad_weight = matmul_nt(grad.t(), whole_rows(inputs).t()) if ctx.needs_input_grad[1] else None
        return grad_inputs, grad_weight
