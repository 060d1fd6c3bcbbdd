"""What a process of each kind has in memory before it holds a model: the interpreter, its libraries, what they start.

Measured, since no formula gives it: `python -m benchmarks memory --bases` prints this table for the machine it runs on.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.runtime import CPU, GENERATOR, GPU, SCORER, STUDENT, Accelerator, Role

_MB = 10**6

# fmt: off
STUDENT_BASE: Mapping[Accelerator, int] = {CPU: 600 * _MB, GPU: 3000 * _MB}
ENGINE_BASE: Mapping[str, Mapping[Accelerator, int]] = {
    "vllm": {CPU: 900 * _MB, GPU: 4000 * _MB},
    "hf": {CPU: 600 * _MB, GPU: 3000 * _MB},
}
CONTROLLER_BASE = 700 * _MB
RAY_BASE = 400 * _MB
# fmt: on

DEVICE_BASE: Mapping[Role, int] = {STUDENT: 1200 * _MB, SCORER: 1500 * _MB, GENERATOR: 1500 * _MB}


def engine_base(kind: str, accelerator: Accelerator) -> int:
    """Of an engine that is not ours to know, as one of transformers."""
    return ENGINE_BASE.get(kind, ENGINE_BASE["hf"])[accelerator]


def device_base(role: Role) -> int:
    """On a GPU: the context, kernels that are loaded, workspaces of cuBLAS, buffers of NCCL, vLLM's graphs."""
    return DEVICE_BASE[role]
