"""Which library multiplies float32 matrices in host memory: measured when a process starts, and then fixed.

oneDNN is twice as fast as MKL on AMD processors with AVX-512, where MKL takes its AVX2 path; with AVX2 alone MKL may be
a third faster, or slower, by the processor and the kind of product. So each kind is tried on one shape, in a few
tenths of a second in all, and oneDNN, the default, is left only for what is clearly faster.

Results of the two differ in their last bits. What must agree bit for bit, the ranks of a student and a run that was
resumed, therefore shares one choice: rank 0 measures, and checkpoints keep what it found. Two runs that are to be
compared bit for bit name the library: STILLHOUSE_FAST=onednn or blas.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from trainer.build import FAST
from trainer.model.fast.product import BLAS, KINDS, MULTIPLY, ONEDNN, Choice, add_by, fixed

CLEARLY_FASTER = 1.1
"""Less is not worth another order of summation; and timings of one machine differ by nearly as much."""

TRIED = {"narrow": (256, 512, 512), "wide": (64, 256, 8192)}
"""n, k, m of the products that are tried."""

_ADDED = (512, 128, 8192)
"""Of wide/tn, where a product is added to a total: as many rows as a chunk of a head's has, since adding costs 1 / n of
the product."""

_TURNS = 5  # the first only warms up
_OBVIOUS, _ENOUGH = 1.5, 3  # times faster, turns: one alone may have been disturbed


def chosen_by(environment: Mapping[str, str]) -> Choice:
    """What a process with this environment (`trainer.build.FAST`) multiplies with; by measurement unless it is told."""
    value = environment.get(FAST, "1")
    if value == "0":
        return fixed(BLAS)
    if value in (ONEDNN, BLAS) or not torch.backends.mkldnn.is_available():
        return fixed(value) if value == BLAS else fixed()
    return measured()


@functools.cache
def measured() -> Choice:
    """By the CPU time of this thread: about 0.3 s at 100 GFLOP/s, once in a process. Leaves random numbers alone."""
    gflops = {}
    for kind in KINDS:
        width, layout = kind.split("/")
        n, k, m = _ADDED if kind == "wide/tn" else TRIED[width]
        x, w, d = torch.full((n, k), 0.5), torch.full((m, k), 0.5), torch.full((n, m), 0.5)
        a, b = {"nt": (x, w), "nn": (d, w.t()), "tn": (d.t(), x.t())}[layout]
        multiply = ADD if kind == "wide/tn" else MULTIPLY
        total = (torch.zeros(a.shape[0], b.shape[0]),) if kind == "wide/tn" else ()
        ways = {library: functools.partial(way, *total, a, b) for library, way in multiply.items()}
        gflops[kind] = {library: 2e-9 * n * k * m / spent for library, spent in seconds(ways).items()}
    libraries = {kind: BLAS if rate[BLAS] > CLEARLY_FASTER * rate[ONEDNN] else ONEDNN for kind, rate in gflops.items()}
    return Choice(libraries, gflops, here())


ADD: Mapping[str, Callable[..., None]] = {library: functools.partial(add_by, library) for library in (ONEDNN, BLAS)}
"""`total += a @ b.T`: how the gradient of a head grows, chunk by chunk."""


def seconds(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """CPU time of each way in this thread, the least of a few turns; few where the difference is plain."""
    best: dict[str, float] = {}
    for turn in range(_TURNS):
        for name, way in ways.items():
            started = time.thread_time()
            way()
            spent = max(time.thread_time() - started, 1e-9)
            if turn:
                best[name] = min(spent, best.get(name, spent))
        if turn >= _ENOUGH and max(best.values()) > _OBVIOUS * min(best.values()):
            break
    return best


def here() -> str:
    """What a choice depends on: the instructions that torch uses on this processor, and the build of torch."""
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def recorded(choice: Choice) -> Choice:
    """With where it was made."""
    return replace(choice, here=here())


def told(choice: Choice) -> str:
    """One line for people."""
    if not choice.gflops:
        return f"{', '.join(sorted(set(choice.libraries.values())))}, not measured"
    names = {ONEDNN: "oneDNN", BLAS: "MKL" if torch.backends.mkl.is_available() else "BLAS"}
    each = [
        f"{kind} {names[choice.libraries[kind]]} ({rate[ONEDNN]:.0f} : {rate[BLAS]:.0f})"
        for kind, rate in choice.gflops.items()
    ]
    return f"{', '.join(each)}; GFLOP/s of oneDNN : {names[BLAS]}"
