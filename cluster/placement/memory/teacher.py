"""The memory of an engine: its share of the weights, what a pass works in, and the cache of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.engines.plan import LABEL_CHUNK_ROWS
from cluster.placement.memory.parts import Part, RoleMemory
from cluster.placement.memory.processes import device_base, engine_base
from cluster.runtime import GPU, SCORER, Accelerator, Role
from trainer.model.sizes import ModelSizes

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to hold."""

    role: Role
    actors: str  # what its processes are called together
    kind: str  # of the engine: vllm, hf, or a user's own
    replicas: int
    shards: int
    accelerator: Accelerator
    width: int  # bytes of a number
    weights: int  # bytes of the whole model as the engine holds it
    max_length: int
    arguments: Mapping[str, Any]  # of `Engine.arguments`


def engine_memory(sizes: ModelSizes, load: EngineLoad) -> RoleMemory:
    """Of every process of a role: with tensor parallelism one per shard."""
    weights = Part("weights", -(-load.weights // load.shards), certain=True)
    work = Part("work buffers", work_bytes(sizes, load))
    cache = Part("key-value cache", cache_bytes(sizes, load))
    process = Part("process", engine_base(load.kind, load.accelerator))
    processes = load.replicas * load.shards
    if load.accelerator == GPU:
        device = (weights, work, cache, Part("CUDA", device_base(load.role)))
        share = load.arguments.get("gpu_memory_utilization", 1.0)
        if load.arguments.get("kv_cache_memory_bytes") is not None:
            share = 1.0
        return RoleMemory(load.actors, processes, device, (process,), share=share)
    return RoleMemory(load.actors, processes, host=(weights, work, cache, process))


def work_bytes(sizes: ModelSizes, load: EngineLoad) -> int:
    """Of one pass: the tensors of one layer, then logits (a scorer's in chunks: in the model's dtype, in float32, and
    their log-softmax; a generator's of one row a sequence)."""
    if load.kind != "vllm":
        tokens = load.max_length
        logits = tokens * sizes.head_rows * (load.width + 2 * FLOAT32)
    else:
        tokens = load.arguments["max_num_batched_tokens"]
        rows = min(LABEL_CHUNK_ROWS, tokens) if load.role == SCORER else load.arguments["max_num_seqs"]
        logits = rows * sizes.head_rows * (load.width + 2 * FLOAT32)
    layer = tokens * (3 * sizes.ffn_width + 6 * sizes.hidden_size) * load.width // load.shards
    return max(layer, logits)


def cache_bytes(sizes: ModelSizes, load: EngineLoad) -> int:
    """As configured; where vLLM takes what is left of the GPU, the least that it needs: one sequence of full length."""
    if load.kind != "vllm":
        return load.max_length * sizes.cached * load.width
    given = load.arguments.get("kv_cache_memory_bytes")
    if given is not None:
        return given
    heads = -(-sizes.kv_heads // load.shards)  # one at least: with more shards than heads several have the same
    return load.max_length * sizes.cached // sizes.kv_heads * heads * load.width
