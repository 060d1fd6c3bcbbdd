"""The functions of this folder as their formulas: right on every device, and what the fast ones are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def matmul_nt(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`a @ b.T`, [n, m] from a [n, k] and b [m, k], in the dtype of `a`; both may be transposed views. Carries no
    gradient. Written to `out` where that is given."""
    return torch.mm(a.detach(), b.detach().to(a.dtype).t(), out=out)


def add_matmul_nt(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, fresh: bool = False) -> None:
    """`total += a @ b.T`, of a total [n, m] of the same dtype or of float32; of a `fresh` one `total = a @ b.T`,
    whatever it holds."""
    product = matmul_nt(a, b)
    total.copy_(product) if fresh else total.add_(product)


def whole_rows(rows: torch.Tensor) -> torch.Tensor:
    """[n, width], with zero rows appended where products of some row counts are faster."""
    return rows


def cache_blocks(rows: torch.Tensor) -> Iterator[slice]:
    """Slices over the rows of [n, width], for several element-wise passes: all at once, since each call costs a kernel
    launch."""
    if rows.shape[0]:
        yield slice(0, rows.shape[0])


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of [n, V] and their columns, largest first."""
    return logits.topk(k, dim=1)


def softmax_and_log_sum_exp(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax [n, V] and log-sum-exp [n, 1] of the rows of z [n, V]. Carries no gradient."""
    z = z.detach()
    return z.softmax(1), z.logsumexp(1, keepdim=True)


def log_sum_exp_without(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """float32 [n, 1] of logits [n, V] of any dtype over a temperature: of all columns but `ids` [n, K]. No gradient."""
    others = logits.detach().float().scatter(1, ids, -torch.inf)
    return (others / temperature).logsumexp(1, keepdim=True)


def row_dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[n, 1]: the product of each row of float32 a [n, V] with that of b. No gradient."""
    return torch.linalg.vecdot(a.detach(), b.detach())[:, None]


def well_scaled(sums: torch.Tensor) -> torch.Tensor:
    """bool: whether sums of float32 exponentials that were not shifted are as exact as shifted ones, for vocabularies
    of up to a million: none overflowed, and those that became 0 are below their rounding."""
    return (sums > 1e-25) & (sums < 1e37)


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """[n] from [n, V], with gradient."""
    return logits.logsumexp(1)


def known_to_be_one(factor: torch.Tensor) -> bool:
    """Whether a scalar is 1, where reading it does not wait for a device."""
    return False


def use_fast_products(body: torch.nn.Module, *, device: torch.device, dtype: torch.dtype) -> int:
    """Give linear layers of `body` a faster forward; returns how many were changed."""
    return 0
