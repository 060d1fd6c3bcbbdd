"""The matrix product in host memory, by the library that was chosen for its kind (`libraries.py` measures that)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

ONEDNN, BLAS = "onednn", "blas"
"""oneDNN, and whatever torch.mm uses: MKL on x86 processors."""

KINDS = tuple(f"{width}/{layout}" for width in ("narrow", "wide") for layout in ("nt", "nn", "tn"))
"""Products by layout as in BLAS (nt: forward, nn: gradient of inputs, tn: gradient of weights), and by whether a side
is as long as a vocabulary."""

_WIDE = 8192
_SMALL = 2**22  # products of n, k, m below cost microseconds: they have the default library, on every machine
_WHOLE_ROWS = 32
_CACHE_ELEMENTS = 2**21
_DEFAULT = ONEDNN if torch.backends.mkldnn.is_available() else BLAS


@dataclass(frozen=True, slots=True)
class Choice:
    """A library for each kind, with the GFLOP/s of both that it was chosen by (none: not measured)."""

    libraries: Mapping[str, str] = field(default_factory=dict)
    gflops: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    here: str = ""  # on which processor and build of torch it was made

    def to_state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return asdict(self)


def fixed(library: str = _DEFAULT) -> Choice:
    """The same library for every kind; by default oneDNN, where this build of torch has it."""
    return Choice(libraries=dict.fromkeys(KINDS, library))


class _Process:
    """What this process uses."""

    choice = fixed()


def use(choice: Choice) -> None:
    """From now on, in this process."""
    _Process.choice = choice


def used() -> Choice:
    return _Process.choice


def width_of(*sides: int) -> str:
    """Of a product with these sides."""
    return "wide" if max(sides) >= _WIDE else "narrow"


def kind_of(a: torch.Tensor, b: torch.Tensor) -> str:
    """Of `a @ b.T` for a [n, k] and b [m, k]; empty where the product is small."""
    (n, k), m = a.shape, b.shape[0]
    if n * k * m < _SMALL:
        return ""
    layout = ("n" if a.stride(1) == 1 else "t") + ("t" if b.stride(1) == 1 else "n")
    return f"{width_of(n, k, m)}/{layout}"


def library_for(a: torch.Tensor, b: torch.Tensor) -> str:
    """Of `a @ b.T`. Kinds that nobody measures (small ones, other layouts) have the default of this build."""
    return _Process.choice.libraries.get(kind_of(a, b)) or _DEFAULT


def _library(a: torch.Tensor, b: torch.Tensor) -> str:
    """Only float32 on a CPU has a choice: bfloat16 goes through oneDNN by itself."""
    return library_for(a, b) if a.is_cpu and a.dtype is torch.float32 and a.shape[0] else BLAS


MULTIPLY: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    ONEDNN: lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
    BLAS: lambda a, b: torch.mm(a, b.t()),
}
"""`a @ b.T`. oneDNN copies an `a` that is a transposed view."""


def matmul_nt(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`a @ b.T`, [n, m] from a [n, k] and b [m, k]; both may be transposed views. Carries no gradient. Written to `out`
    where that is given; a `b` of another dtype is cast to that of `a`, some rows at a time.

    oneDNN keeps about a megabyte of generated code for every shape it has seen: let row counts come from `whole_rows`.
    """
    a, b = a.detach(), b.detach()
    library = _library(a, b)
    if a.dtype is b.dtype and (out is None or library == BLAS):
        return MULTIPLY[library](a, b) if out is None else torch.mm(a, b.t(), out=out)
    out = a.new_empty(a.shape[0], b.shape[0]) if out is None else out
    for rows in _in_cache(b, a):
        out[:, rows] = MULTIPLY[library](a, b[rows].to(a.dtype))
    return out


def add_matmul_nt(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, fresh: bool = False) -> None:
    """`total += a @ b.T`, of a total [n, m] of the same dtype or of float32; of a `fresh` one `total = a @ b.T`,
    whatever it holds."""
    a, b = a.detach(), b.detach()
    add_by(_library(a, b), total, a, b, fresh=fresh)


def add_by(library: str, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, fresh: bool = False) -> None:
    """As `add_matmul_nt`. torch.mm adds in place; oneDNN makes a tensor of the product, and one more of a transposed
    `a`. Of the gradient of a head these would be 100 MB each, whose pages the kernel clears first: so it is given some
    rows at a time, of which both stay in the cache."""
    if library == BLAS and a.dtype is total.dtype:
        total.addmm_(a, b.t(), beta=0 if fresh else 1)
        return
    for rows in _in_cache(a, b):
        product = MULTIPLY[library](a[rows], b)
        total[rows].copy_(product) if fresh else total[rows].add_(product)


def _in_cache(rows: torch.Tensor, other: torch.Tensor) -> Iterator[slice]:
    """Slices over rows that are multiplied with another matrix, so that the rows and the product of each stay in the
    cache, and below what an allocator gives back to the kernel."""
    step = max(64, _CACHE_ELEMENTS // max(1, sum(other.shape)) // 64 * 64) if rows.is_cpu else max(1, rows.shape[0])
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def whole_rows(rows: torch.Tensor) -> torch.Tensor:
    """[n, width] with zero rows appended up to a multiple of 32 on a CPU: few shapes for oneDNN. As they are where
    only small products go through it."""
    missing = -rows.shape[0] % _WHOLE_ROWS
    if not missing or not rows.is_cpu:
        return rows
    if rows.dtype is torch.float32 and ONEDNN not in _Process.choice.libraries.values():
        return rows
    n, width = rows.shape
    whole = rows.new_empty(n + missing, width)  # torch's own padding would fill all of it first
    whole[:n], whole[n:] = rows, 0.0
    return whole
