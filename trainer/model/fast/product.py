"""The matrix product in host memory (`cpu.py` has the figures)."""

from __future__ import annotations

import torch

_WHOLE_ROWS = 32


def matmul_nt(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T`, [n, m] from a [n, k] and b [m, k] of one dtype; both may be transposed views. Carries no gradient.

    float32 on a CPU goes through oneDNN where this build of torch has it; bfloat16 does so by itself. oneDNN keeps
    about a megabyte of generated code for every shape it has seen: let row counts come from `whole_rows`.
    """
    if a.is_cpu and a.dtype is torch.float32 and a.shape[0] and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a.detach(), b.detach(), None, "none", [], "")
    return torch.mm(a.detach(), b.detach().t())


def whole_rows(rows: torch.Tensor) -> torch.Tensor:
    """[n, width] with zero rows appended up to a multiple of 32 on a CPU: few shapes for `matmul_nt`."""
    missing = -rows.shape[0] % _WHOLE_ROWS
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if rows.is_cpu and missing else rows
