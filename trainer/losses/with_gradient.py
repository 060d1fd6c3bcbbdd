"""Values of rows together with their gradients, computed in one go: where a gradient is known in closed form, autograd
would go over [rows, events] several times more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Gradient = Callable[[], torch.Tensor]


def with_gradient(values: torch.Tensor, *inputs: tuple[torch.Tensor, Gradient]) -> torch.Tensor:
    """`values` [N], whose gradient by each input [N, ...] is what stands beside it: a function that gives a new tensor
    of that shape, called at once, and only where the input asks for a gradient. First order only."""
    wanted = [(of, gradient()) for of, gradient in inputs if of.requires_grad and torch.is_grad_enabled()]
    for of, gradient in wanted:
        assert of.shape == gradient.shape, (of.shape, gradient.shape)
    if not wanted:
        return values
    return _WithGradient.apply(values, *(part for pair in wanted for part in pair))


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs[1::2])
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: the buffers are this node's own, and autograd refuses a second backward through changed ones.
        scaled = [g.mul_(grad.view(-1, *[1] * (g.dim() - 1))) for g in ctx.saved_tensors]
        return None, *(part for gradient in scaled for part in (gradient, None))
