"""What a process of each kind has in memory before it holds a model: the interpreter, its libraries, what they start.

Measured, since no formula gives it. On hosts: 2026-11-29, 2 cores with AVX-512, Python 3.11, torch 2.13, the column
"process alone" of the first command; the controller's is between that and the second's

    python -m benchmarks memory configs/demo.yaml --small --set training.steps=6
    python -m benchmarks memory configs/demo.yaml --set training.steps=5

On GPUs: estimates that were not measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.runtime import CPU, GENERATOR, GPU, ROLLOUT, SCORER, STUDENT, Accelerator, Role

_MB = 10**6

# fmt: off
STUDENT_BASE: Mapping[Accelerator, int] = {CPU: 540 * _MB, GPU: 3000 * _MB}
ENGINE_BASE: Mapping[str, Mapping[Accelerator, int]] = {
    "vllm": {CPU: 570 * _MB, GPU: 4000 * _MB},
    "hf": {CPU: 600 * _MB, GPU: 3000 * _MB},
}
CONTROLLER_BASE = 1200 * _MB
RAY_BASE = 900 * _MB  # all of its processes together
# fmt: on

DEVICE_BASE: Mapping[Role, int] = {STUDENT: 1200 * _MB, **dict.fromkeys((SCORER, GENERATOR, ROLLOUT), 1500 * _MB)}


def engine_base(kind: str, accelerator: Accelerator) -> int:
    """Of an engine that is not ours to know, as one of transformers."""
    return ENGINE_BASE.get(kind, ENGINE_BASE["hf"])[accelerator]


def device_base(role: Role) -> int:
    """On a GPU: the context, kernels that are loaded, workspaces of cuBLAS, buffers of NCCL, vLLM's graphs."""
    return DEVICE_BASE[role]
