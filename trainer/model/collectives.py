"""What ranks tell each other beside gradients: a few numbers, results of tests, the next token. All collective."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


def all_gather(numbers: torch.Tensor) -> torch.Tensor:
    """Every rank's [n] numbers as [world, n] in host memory, the same on all ranks; waits for the device."""
    rows = [torch.empty_like(numbers) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, numbers)
    return torch.stack(rows).cpu()


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order; of a process that joined no group its own."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values of a tensor that all ranks have in the same shape; overwrites and returns it."""
    distributed.broadcast(tensor, src=0)
    return tensor


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place."""
    distributed.all_reduce(tensor)
    return tensor
