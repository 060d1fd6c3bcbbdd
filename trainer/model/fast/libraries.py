"""Which library multiplies float32 matrices in host memory: measured when a process starts, and then fixed.

oneDNN is twice as fast as MKL on AMD processors with AVX-512, where MKL takes its AVX2 path; with AVX2 alone MKL may be
a third faster, or slower, by the processor and the kind of product. So each kind is tried on one shape, in a few
tenths of a second in all, and oneDNN, the default, is left only for what is clearly faster.

Results of the two differ in their last bits. What must agree bit for bit, the ranks of a student and a run that was
resumed, therefore shares one choice: rank 0 measures, and checkpoints keep what it found (`Choice.here`). Two runs that
are to be compared bit for bit name the library: STILLHOUSE_FAST=onednn or blas.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.build import FAST

ONEDNN, BLAS = "onednn", "blas"
"""oneDNN, and whatever torch.mm uses: MKL on x86 processors."""

KINDS = tuple(f"{width}/{layout}" for width in ("narrow", "wide") for layout in ("nt", "nn", "tn"))
"""Products by layout as in BLAS (nt: forward, nn: gradient of inputs, tn: gradient of weights), and by whether a side
is as long as a vocabulary."""

CLEARLY_FASTER = 1.1
"""Less is not worth another order of summation; and timings of one machine differ by nearly as much."""

_WIDE = 8192
_SMALL = 2**22  # products of n, k, m below cost microseconds: they stay with oneDNN, everywhere and unmeasured
_TRIED = {"narrow": (256, 512, 512), "wide": (64, 256, 16384)}  # n, k, m
_TURNS = 4  # the first only warms up
_OBVIOUS = 1.5


@dataclass(frozen=True, slots=True)
class Choice:
    """A library for each kind, with the GFLOP/s of both that it was chosen by (none: not measured)."""

    libraries: Mapping[str, str] = field(default_factory=dict)
    gflops: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    here: str = ""  # of which processor and torch it holds

    def to_state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return asdict(self)

    @property
    def told(self) -> str:
        """One line for people."""
        if not self.gflops:
            return f"{', '.join(sorted(set(self.libraries.values())))}, not measured"
        names = {ONEDNN: "oneDNN", BLAS: "MKL" if torch.backends.mkl.is_available() else "BLAS"}
        rates = {kind: (rate[ONEDNN], rate[BLAS]) for kind, rate in self.gflops.items()}
        each = [f"{kind} {names[self.libraries[kind]]} ({one:.0f} : {blas:.0f})" for kind, (one, blas) in rates.items()]
        return f"{', '.join(each)}; GFLOP/s of oneDNN : {names[BLAS]}"


def here() -> str:
    """What a choice depends on: the instructions that torch uses on this processor, and the build of torch."""
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def fixed(library: str) -> Choice:
    """The same library for every kind."""
    return Choice(libraries=dict.fromkeys(KINDS, library), here=here())


def default() -> Choice:
    """What needs no measurement: oneDNN where this build of torch has it."""
    return fixed(ONEDNN if torch.backends.mkldnn.is_available() else BLAS)


def chosen_by(environment: Mapping[str, str]) -> Choice:
    """What a process with this environment (`trainer.build.FAST`) multiplies with; by measurement unless it is told."""
    value = environment.get(FAST, "1")
    if value == "0":
        return fixed(BLAS)
    if not torch.backends.mkldnn.is_available():
        return default()
    return fixed(value) if value in (ONEDNN, BLAS) else measured()


@functools.cache
def measured() -> Choice:
    """By the CPU time of this thread: 0.2 to 0.3 s at 100 GFLOP/s, once in a process. Leaves random numbers alone."""
    gflops = {kind: _rates(kind) for kind in KINDS}
    libraries = {kind: BLAS if rate[BLAS] > CLEARLY_FASTER * rate[ONEDNN] else ONEDNN for kind, rate in gflops.items()}
    return Choice(libraries, gflops, here())


def _rates(kind: str) -> dict[str, float]:
    """GFLOP/s of both libraries, which take turns."""
    width, layout = kind.split("/")
    n, k, m = _TRIED[width]
    x, w, d = torch.full((n, k), 0.5), torch.full((m, k), 0.5), torch.full((n, m), 0.5)
    a, b = {"nt": (x, w), "nn": (d, w.t()), "tn": (d.t(), x.t())}[layout]
    best: dict[str, float] = {}
    for turn in range(_TURNS):
        for library, multiply in _LIBRARIES.items():
            started = time.thread_time()
            multiply(a, b)
            spent = max(time.thread_time() - started, 1e-9)
            if turn:
                best[library] = min(spent, best.get(library, spent))
        if turn and max(best.values()) > _OBVIOUS * min(best.values()):
            break
    return {library: 2e-9 * n * k * m / seconds for library, seconds in best.items()}


_LIBRARIES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    ONEDNN: lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
    BLAS: lambda a, b: torch.mm(a, b.t()),
}


class _Process:
    """What this process uses."""

    choice = default()


_DEFAULT = default().libraries[KINDS[0]]


def use(choice: Choice) -> None:
    """From now on, in this process."""
    _Process.choice = choice


def used() -> Choice:
    return _Process.choice


def uses(library: str) -> bool:
    """Whether any kind of product goes through it here."""
    return library in _Process.choice.libraries.values()


def kind_of(a: torch.Tensor, b: torch.Tensor) -> str:
    """Of `a @ b.T` for a [n, k] and b [m, k]; empty where the product is small."""
    (n, k), m = a.shape, b.shape[0]
    if n * k * m < _SMALL:
        return ""
    layout = ("n" if a.stride(1) == 1 else "t") + ("t" if b.stride(1) == 1 else "n")
    return f"{'wide' if max(n, k, m) >= _WIDE else 'narrow'}/{layout}"


def library_for(kind: str) -> str:
    """Kinds that nobody measures (small ones, other layouts) go to the default of this build."""
    return _Process.choice.libraries.get(kind) or _DEFAULT
