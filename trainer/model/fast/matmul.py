"""The device facts that the [rows, vocabulary] code lives by: which matrix product is fast, and how many rows stay
in the CPU's cache. A file of its own because teachers' labels, the loss and the evaluation all cut their work by it.

Measured on an AMD EPYC (AVX-512, no AMX), one thread, float32, [512, 384] x [49152, 384]: torch.mm (MKL, which takes
its AVX2 path on AMD) 85 GFLOP/s, oneDNN 190. On [512, 49152] float32 an element-wise pass costs 10 us a row, on blocks
of 2 MB (in cache) 4 us.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CACHE_BLOCK_BYTES = 2 * 2**20
_WHOLE_ROWS = 32


def matmul_nt(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T`, [n, m] from a [n, k] and b [m, k] of one dtype; both may be transposed views. Carries no gradient.

    float32 on a CPU goes through oneDNN where this build of torch has it; bfloat16 does so by itself. oneDNN keeps
    about a megabyte of generated code for every shape it has seen: let row counts come from `whole_rows`.
    """
    a, b = a.detach(), b.detach()
    if a.is_cpu and a.dtype is torch.float32 and a.shape[0] and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


def whole_rows(rows: torch.Tensor) -> torch.Tensor:
    """[n, width] with zero rows appended up to a multiple of 32 on a CPU (few shapes for `matmul_nt`), else as it
    is."""
    missing = -rows.shape[0] % _WHOLE_ROWS
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if rows.is_cpu and missing else rows


def cache_blocks(rows: torch.Tensor) -> Iterator[slice]:
    """Slices over the rows of [n, width]: a few rows at a time on a CPU, so that several element-wise passes over a
    block read it from cache; everything at once on other devices, where each call costs a kernel launch."""
    step = max(1, _CACHE_BLOCK_BYTES // (4 * rows.shape[1])) if rows.is_cpu else max(1, rows.shape[0])
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))
