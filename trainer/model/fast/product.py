"""The matrix product in host memory, by whichever library is faster for its kind (`libraries.py` measures that)."""

from __future__ import annotations

import torch

from trainer.model.fast.libraries import ONEDNN, kind_of, library_for, uses

_WHOLE_ROWS = 32


def matmul_nt(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T`, [n, m] from a [n, k] and b [m, k] of one dtype; both may be transposed views. Carries no gradient.

    float32 on a CPU goes through oneDNN or torch.mm; bfloat16 goes through oneDNN by itself. oneDNN keeps about a
    megabyte of generated code for every shape it has seen: let row counts come from `whole_rows`.
    """
    a, b = a.detach(), b.detach()
    if a.is_cpu and a.dtype is torch.float32 and a.shape[0] and library_for(kind_of(a, b)) == ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


def whole_rows(rows: torch.Tensor) -> torch.Tensor:
    """[n, width] with zero rows appended up to a multiple of 32 on a CPU: few shapes for oneDNN. As they are where
    nothing goes through it."""
    missing = -rows.shape[0] % _WHOLE_ROWS
    if not missing or not rows.is_cpu or (rows.dtype is torch.float32 and not uses(ONEDNN)):
        return rows
    return torch.nn.functional.pad(rows, (0, 0, 0, missing))
