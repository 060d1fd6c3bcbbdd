"""The sizes of a model that its memory follows from, read off the model on the meta device: nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Counts of elements, whatever their dtype."""

    trained: tuple[int, ...]  # of each parameter that is trained, in the model's order
    frozen: int
    head: int  # of the output embedding, [rows, width]
    head_rows: int  # V, padding included
    hidden_size: int
    num_layers: int
    ffn_width: int  # the widest of a layer's inner rows that one token has
    cached: int  # keys and values that one token leaves in a cache, all layers together
    kv_heads: int = 1  # of a layer, into which a cache can be split
    head_trained: bool = True
    tied: bool = False  # the head is the input embedding

    @property
    def all(self) -> int:
        return sum(self.trained) + self.frozen


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes beside the weights, of one pass of a micro-batch of `tokens` through the body and back."""

    tokens: int
    saved: int  # kept for the backward pass, when the head is reached
    peak: int  # the most at any moment, gradients of the parameters at hand included


def sizes_of(model: torch.nn.Module) -> ModelSizes:
    """Of a causal language model of transformers, on any device; adapters in it count."""
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    parameters = list(model.parameters())
    return ModelSizes(
        trained=tuple(p.numel() for p in parameters if p.requires_grad),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        head=head.numel(),
        head_rows=head.shape[0],
        hidden_size=head.shape[1],
        num_layers=_layers(config),
        ffn_width=_ffn_width(config),
        cached=_cached(config),
        kv_heads=1 if getattr(config, "kv_lora_rank", None) else _kv_heads(config),
        head_trained=head.requires_grad,
        tied=head is embedding,
    )


def _ffn_width(config: Any) -> int:
    return max(map(_ffn_width_of, _layer_configs(config)))


def _ffn_width_of(layer: Any) -> int:
    inner = getattr(layer, "intermediate_size", None) or 4 * _width(layer)
    experts = getattr(layer, "num_experts_per_tok", None) or 0
    return max(inner, experts * (getattr(layer, "moe_intermediate_size", None) or inner)) if experts else inner


def _cached(config: Any) -> int:
    latent = getattr(config, "kv_lora_rank", None)  # multi-head latent attention caches one latent and one rotary key
    if latent:
        return _layers(config) * (latent + (getattr(config, "qk_rope_head_dim", None) or 0))
    return sum(2 * _kv_heads_of(layer) * _head_width(layer) for layer in _layer_configs(config))


def _head_width(layer: Any) -> int:
    return getattr(layer, "head_dim", None) or _width(layer) // (getattr(layer, "num_attention_heads", None) or 1)


def _kv_heads(config: Any) -> int:
    return min(map(_kv_heads_of, _layer_configs(config)))


def _kv_heads_of(layer: Any) -> int:
    return getattr(layer, "num_key_value_heads", None) or getattr(layer, "num_attention_heads", None) or 1


def _layer_configs(config: Any) -> Sequence[Any]:
    """The configuration of each layer: where layers differ (Gemma 4), that of the whole model refuses to be asked."""
    return config.per_layer_config if config.is_heterogeneous else [config] * _layers(config)


def _layers(config: Any) -> int:
    return getattr(config, "num_hidden_layers", None) or 1


def _width(config: Any) -> int:
    return getattr(config, "hidden_size", None) or 1
