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
    cache_is_given: bool = False  # by the configuration


def engine_memory(sizes: ModelSizes, load: EngineLoad) -> RoleMemory:
    """Of every process of a role: with tensor parallelism one per shard."""
    weights = Part("weights", -(-load.weights // load.shards), certain=True)
    work, cache = Part("work buffers", work_bytes(sizes, load)), Part("key-value cache", cache_bytes(sizes, load))
    process = Part("process", engine_base(load.kind, load.accelerator))
    processes = load.replicas * load.shards
    if load.accelerator == GPU:
        device = (weights, work, cache, Part("CUDA", device_base(load.role)))
        given = load.arguments.get("kv_cache_memory_bytes") is not None
        share = 1.0 if given else load.arguments.get("gpu_memory_utilization", 1.0)
        return RoleMemory(load.actors, processes, device, (process,), share=share)
    packing = max(0, _packed(sizes, load) - work.num_bytes - cache.num_bytes)
    return RoleMemory(load.actors, processes, host=(weights, work, cache, Part("packing of weights", packing), process))


def work_bytes(sizes: ModelSizes, load: EngineLoad) -> int:
    """Of one pass: the tensors of one layer, or the logits (a scorer's in chunks, a generator's of one row a sequence):
    in the model's dtype, on an accelerator in float32 and their log-softmax too, which a host works off in its cache.
    """
    copies = load.width + (2 * FLOAT32 if load.accelerator == GPU or load.kind != "vllm" else 0)
    if load.kind != "vllm":
        tokens = rows = load.max_length
    else:
        tokens = load.arguments["max_num_batched_tokens"]
        rows = min(LABEL_CHUNK_ROWS, tokens) if load.role == SCORER else load.arguments["max_num_seqs"]
    layer = tokens * (3 * sizes.ffn_width + 6 * sizes.hidden_size) * load.width // load.shards
    return max(layer, rows * sizes.head_rows * copies)


def cache_bytes(sizes: ModelSizes, load: EngineLoad) -> int:
    """As configured, and of a scorer on a host no more than a step reads (`plans.py`); where vLLM takes what is left of
    the GPU, the least that it needs: one sequence of full length."""
    tokens, arguments = load.max_length, load.arguments
    given = arguments.get("kv_cache_memory_bytes")
    if given is not None and (load.accelerator == GPU or load.role != SCORER or load.cache_is_given):
        return given
    if given is not None:
        tokens += arguments["max_num_batched_tokens"] + arguments["max_num_seqs"] * arguments["block_size"]
    heads = -(-sizes.kv_heads // load.shards)  # one at least: with more shards than heads several have the same
    needed = tokens * sizes.cached // sizes.kv_heads * heads * load.width
    return needed if given is None else min(given, needed)


def _packed(sizes: ModelSizes, load: EngineLoad) -> int:
    """vLLM on a host lays matrices out anew for its processor, while those that were read are still there. That is over
    before the cache is made."""
    if load.kind != "vllm":
        return 0
    return max(0, load.weights - sizes.head * load.width) // load.shards
