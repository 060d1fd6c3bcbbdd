"""New weights for a vLLM engine, bucket by bucket, between two of its steps.

vLLM's layer-wise reload takes names as they stand in a model's files: a layer is made anew when all of its weights are
there (fused, cast, and on a host packed for its processor), and one of which nothing comes stays as it is. On GPUs the
same three calls, start, update and finish, are those of its weight-transfer engines.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from trainer.errors import InfrastructureError
from trainer.types import WeightBucket

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


class WeightUpdates:
    """Of one engine; called in its thread."""

    def __init__(self) -> None:
        self._active = False
        self._loaded: set[str] = set()

    def take(self, engine: LLMEngine, bucket: WeightBucket) -> bool:
        """Whether the engine has all of a version now. Raises `InfrastructureError` where a layer got only a part."""
        config = engine.model_config
        engine.apply_model(lambda model: self._load(model, bucket, config))
        if bucket.header.is_last:
            # Keys and values of the prompts were made by the weights before.
            engine.reset_prefix_cache(reset_running_requests=True)
        return bucket.header.is_last

    def _load(self, model: torch.nn.Module, bucket: WeightBucket, config: object) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if bucket.header.index == 0:
            if self._active:  # a version that never became whole
                finalize_layerwise_reload(model, config)
            initialize_layerwise_reload(model)
            self._active, self._loaded = True, set()
        self._loaded |= model.load_weights(tensors(bucket)) or set()
        if bucket.header.is_last:
            partial = list(half_loaded(model))
            # That nothing came of a layer, a frozen one for example, is meant, and would be warned of each time.
            logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
            finalize_layerwise_reload(model, config)
            self._active = False
            if partial:
                raise InfrastructureError(f"only a part of the weights came of {', '.join(partial[:3])}")
            pack_tied_head(model, self._loaded)


def tensors(bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
    """A copy of each: what lies in an object store cannot be written to, and torch warns of that."""
    dtype = getattr(torch, bucket.dtype)
    for name, array in bucket.weights.items():
        yield name, torch.from_numpy(array.copy()).view(dtype)


def half_loaded(model: torch.nn.Module) -> Iterator[str]:
    """Layers that wait for more, but for embeddings, whose last rows are padding that no file holds."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        waits = info.can_load() and 0 < info.load_numel < info.load_numel_total
        if waits and not isinstance(layer, VocabParallelEmbedding):
            yield name


def pack_tied_head(model: torch.nn.Module, loaded: set[str]) -> None:
    """On a host a head that is the embedding has a packed copy of it, which vLLM's reload leaves as it was."""
    head = getattr(model, "lm_head", None)
    if not hasattr(head, "cpu_linear"):
        return
    parameters = dict(model.named_parameters())
    if any(parameters.get(name) is head.weight for name in loaded):
        from vllm.model_executor.layers import utils

        utils.dispatch_cpu_unquantized_gemm(head, False)
