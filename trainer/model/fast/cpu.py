"""The functions of this folder for tensors in host memory: which matrix product is fast, how many rows stay in the
cache, which passes over [rows, vocabulary] can be spared.

Measured on an AMD EPYC (AVX-512, no AMX), one thread, float32, [512, 384] x [49152, 384]: torch.mm (MKL, which takes
its AVX2 path on AMD) 85 GFLOP/s, oneDNN 190; elsewhere it may be the other way round (`libraries.py`). On [512, 49152]
float32 an element-wise pass costs 10 us a row, on blocks of 2 MB (in cache) 4 us.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trainer.model.fast import plain
from trainer.model.fast.linear import use_fast_products
from trainer.model.fast.product import add_matmul_nt, matmul_nt, whole_rows

__all__ = [
    "add_matmul_nt",
    "cache_blocks",
    "known_to_be_one",
    "log_sum_exp",
    "log_sum_exp_without",
    "matmul_nt",
    "row_dots",
    "softmax_and_log_sum_exp",
    "top_k",
    "use_fast_products",
    "whole_rows",
]

_CACHE_BLOCK_BYTES = 2 * 2**20


def cache_blocks(rows: torch.Tensor) -> Iterator[slice]:
    """Slices over the rows of [n, width]: a few rows at a time, so that several element-wise passes over a block read
    it from cache."""
    if not rows.is_cpu:
        yield from plain.cache_blocks(rows)
        return
    step = max(1, _CACHE_BLOCK_BYTES // (4 * rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of [n, V] and their columns, largest first; of equal ones any.

    In two levels: the k largest lie in the k groups with the largest maxima, so the maxima of groups of about
    sqrt(V / k) columns say where to look.
    """
    n, v = logits.shape
    if not logits.is_cpu:
        return plain.top_k(logits, k)
    depth = math.isqrt(v // k) if k else 0
    if depth < 4:
        columns = _largest(logits, k)
    else:
        width = v // depth  # group j is the columns j, j + width, j + 2 width, ...
        maxima = logits.new_empty(n, width)
        for block in cache_blocks(logits):
            torch.amax(logits[block, : depth * width].detach().unflatten(1, (depth, width)), 1, out=maxima[block])
        groups = _largest(maxima, k)
        members = logits[:, : depth * width].unflatten(1, (depth, width))
        members = members.gather(2, groups[:, None, :].expand(n, depth, k)).flatten(1)
        places = _largest(torch.cat([members, logits[:, depth * width :]], dim=1), k)
        inside = groups.gather(1, places % k) + places // k * width
        columns = torch.where(places < depth * k, inside, places + depth * (width - k))
    values, places = logits.gather(1, columns).sort(1, descending=True)
    return values, columns.gather(1, places)


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [n, k]: columns of the k largest of each row of [n, m], in no order. By numpy, which has vector
    instructions for it: a third of what torch.topk takes."""
    values = values.detach()
    numbers = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    others = values.shape[1] - k
    if not others:
        return torch.arange(k).expand(len(values), -1)
    return torch.from_numpy(np.argpartition(numbers, others, axis=1)[:, others:])


def log_sum_exp_without(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """float32 [n, 1] of logits [n, V] of any dtype over a temperature: of all columns but `ids` [n, K]. No gradient.

    exp as it is, without a look for the maximum: one pass less. Rows where that loses digits are computed again.
    """
    if not logits.is_cpu:
        return plain.log_sum_exp_without(logits, ids, temperature)
    logits = logits.detach()
    sums = torch.empty(logits.shape[0], 1)
    for block in cache_blocks(logits):
        terms = exponentials(logits[block], temperature)
        torch.sum(terms.scatter_(1, ids[block], 0.0), 1, keepdim=True, out=sums[block])
    made, again = sums.log(), ~plain.well_scaled(sums[:, 0])
    if again.any():
        made[again] = plain.log_sum_exp_without(logits[again], ids[again], temperature)
    return made


def exponentials(rows: torch.Tensor, temperature: float) -> torch.Tensor:
    """float32 exp(rows / temperature), a tensor of its own."""
    if temperature != 1.0:
        return (rows.float() / temperature).exp_()
    return rows.exp() if rows.dtype is torch.float32 else rows.float().exp_()


def row_dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[n, 1]: the product of each row of float32 a [n, V] with that of b, at half the price of torch's, which writes
    all products first. No gradient."""
    if not a.is_cpu:
        return plain.row_dots(a, b)
    with np.errstate(invalid="ignore"):  # 0 * inf is the caller's
        return torch.from_numpy(np.vecdot(a.detach().numpy(), b.detach().numpy()))[:, None]


def softmax_and_log_sum_exp(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax [n, V] and log-sum-exp [n, 1] of the rows of z [n, V]. Carries no gradient.

    One fused softmax gives both: its largest entry is 1 / sum exp(z - max). It is half the price of `exp` or of
    `logsumexp`.
    """
    if not z.is_cpu:
        return plain.softmax_and_log_sum_exp(z)
    z = z.detach()
    probabilities = z.softmax(1)
    return probabilities, z.amax(1, keepdim=True) - probabilities.amax(1, keepdim=True).log()


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """[n] from [n, V], with gradient, at half the price of torch's: its gradient is the softmax that gave the value."""
    return _LogSumExp.apply(logits) if logits.is_cpu else plain.log_sum_exp(logits)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        probabilities, value = softmax_and_log_sum_exp(logits)
        ctx.save_for_backward(probabilities)
        return value[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (probabilities,) = ctx.saved_tensors
        return probabilities.mul_(grad[:, None])


def known_to_be_one(factor: torch.Tensor) -> bool:
    """Whether a scalar is 1, where reading it does not wait for a device."""
    return factor.is_cpu and factor.item() == 1.0
