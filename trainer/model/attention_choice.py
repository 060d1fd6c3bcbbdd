"""Which attention a student can be trained with, decided from what its layers ask for, before there are weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from trainer.errors import ConfigError
from trainer.model.attention import IMPLEMENTATIONS
from trainer.model.attention_probe import LayerAttention, layer_attention

_HALF = {"float16", "bfloat16"}
_VARLEN_MAX_HEAD = 256

_CHANGING_ROPE = ("longrope", "dynamic")
"""Rotations that are others, for the whole row, once one position passes the original length."""


def choose_attention(
    requested: str, *, device_type: str, dtype: str, config: Any, trust_remote_code: bool = False
) -> str:
    """The attention to use for a student with this transformers config; `requested` "auto" takes the fastest that
    fits.

    `device_type` and `dtype` are those of the student (`StudentPlan`), which need not exist on this machine. Raises
    `ConfigError` where the model attends in a way that packing does not cover, or the named kernel does not fit.
    """
    layers = packable_layers(config, trust_remote_code=trust_remote_code)
    dropout = getattr(config.get_text_config(), "attention_dropout", 0.0)
    if requested == "auto":
        return "sdpa" if _varlen_obstacle(device_type, dtype, layers, dropout) else "varlen"
    if requested == "sdpa":
        return requested
    if requested == "varlen":
        obstacle = _varlen_obstacle(device_type, dtype, layers, dropout)
    elif requested == "flash_attention_2":
        obstacle = _flash_obstacle(device_type, dtype, layers)
    else:
        obstacle = f"there is no such attention; there are {', '.join(IMPLEMENTATIONS)}"
    if obstacle:
        raise ConfigError(f"student.attention: {requested}: {obstacle}. Write attention: auto")
    return requested


def packable_layers(config: Any, *, trust_remote_code: bool = False) -> tuple[LayerAttention, ...]:
    """What the layers of a student ask for. Raises `ConfigError` where sequences cannot be packed for one of them."""
    layers = layer_attention(config, role="student.model", trust_remote_code=trust_remote_code)
    kinds: set[str] = set()
    if any(layer is None for layer in layers):
        named = set(getattr(config.get_text_config(), "layer_types", None) or ())
        kinds |= named - {"full_attention", "sliding_attention"} or {"layers without attention"}
    kinds |= {argument for layer in layers if layer for argument in layer.unknown}
    if kinds or not layers:
        raise ConfigError(
            f"student.model: {config.model_type} uses {', '.join(sorted(kinds)) or 'no attention'}; packed training "
            "covers causal attention with or without a sliding window. Choose another student"
        )
    return tuple(layer for layer in layers if layer is not None)


def changing_lengths(config: Any, *, role: str, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Row lengths beyond which a model may compute otherwise than below, ascending: its windows and chunks, and the
    length after which its positions are rotated or scaled in another way. For tests, which are to cross them."""
    text = config.get_text_config()
    try:
        layers = layer_attention(config, role=role, trust_remote_code=trust_remote_code)
        found = {layer.window for layer in layers if layer is not None}
    except ConfigError:  # masks of its own: what its config names, which it may ignore
        found = {getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "index_topk")}
    for rope in _ropes(config):
        if rope.get("rope_type") in _CHANGING_ROPE or rope.get("llama_4_scaling_beta"):
            found.add(_original_length(rope, config))
    return tuple(sorted(length for length in found if length))


def lengths_to_cross(
    lengths: Sequence[int], *, max_length: int, longest_row: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the lengths at which a model changes and that rows of `max_length` exceed: those that a row of `longest_row`
    tokens crosses, and those that are too long for it."""
    reached = [length for length in lengths if length + 1 < max_length]
    split = sum(length + 1 < longest_row for length in reached)
    return tuple(reached[:split]), tuple(reached[split:])


def ignores_window(config: Any, *, role: str, trust_remote_code: bool = False) -> bool:
    """Whether this config has a `sliding_window` that no layer of transformers' model uses."""
    if getattr(config.get_text_config(), "sliding_window", None) is None:
        return False
    try:
        layers = layer_attention(config, role=role, trust_remote_code=trust_remote_code)
    except ConfigError:  # masks of its own, which cannot be followed here
        return False
    return all(layer is None or layer.window is None for layer in layers)


def refuse_silent_windows(config: Any, *, max_length: int, trust_remote_code: bool = False) -> None:
    """Raises `ConfigError` for a teacher some of whose layers have a window that only their mask says (Qwen2-MoE):
    vLLM, which builds no masks, gives none to any of them."""
    try:
        layers = layer_attention(config, role="teacher.model", trust_remote_code=trust_remote_code)
    except ConfigError:  # masks of its own, which cannot be followed here
        return
    windows = {layer.window for layer in layers if layer is not None}
    silent = [layer.window for layer in layers if layer is not None and layer.window and layer.told_window is None]
    if len(windows) > 1 and silent and max_length > min(silent):
        raise ConfigError(
            f"data.max_length: {max_length} is over the window of {min(silent)} tokens that some layers of the teacher "
            f"({config.model_type}) have in transformers and none has in vLLM; write at most {min(silent)}, or "
            "engine: {kind: hf}"
        )


def refuse_changing_rope(config: Any, *, max_length: int, role: str, why: str) -> None:
    """Refuse rotations that change for the whole row once one position passes the original length (LongRoPE, dynamic
    NTK). Raises `ConfigError`, with `why` this matters to the model of this `role`, where `max_length` lets it happen.
    """
    for rope in _ropes(config):
        original = _original_length(rope, config)
        if rope.get("rope_type") in _CHANGING_ROPE and max_length > original:
            raise ConfigError(
                f"data.max_length: {max_length} is over the {original} positions after which the {role}'s rotary "
                f"embedding ({rope['rope_type']}) changes for all of a row, and {why}; write at most {original}"
            )


def refuse_unpackable(config: Any, *, max_length: int, trust_remote_code: bool = False) -> None:
    """Raises `ConfigError` where the attention of a student with this config is not what packed training covers."""
    packable_layers(config, trust_remote_code=trust_remote_code)
    why = "a student's sequence would depend on what it is packed with"
    refuse_changing_rope(config, max_length=max_length, role="student", why=why)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of the rotary embedding, or of each kind of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def _original_length(rope: dict[str, Any], config: Any) -> int:
    text = config.get_text_config()
    return (
        rope.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
    )


def _varlen_obstacle(device_type: str, dtype: str, layers: Sequence[LayerAttention], dropout: float) -> str | None:
    if device_type == "cpu" or dtype not in _HALF:
        return f"it runs on accelerators in 16 bits, not on {device_type} in {dtype}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} does not have it"
    if any(layer.soft_cap is not None for layer in layers):
        return "it cannot soft-cap attention scores as this model does"
    if dropout:
        return "it has no attention dropout"
    widest = max(layer.key_width for layer in layers)
    if widest > _VARLEN_MAX_HEAD:
        return f"its heads may have {_VARLEN_MAX_HEAD} dimensions, this model's have {widest}"
    for layer in layers:
        if layer.key_width != layer.value_width:
            return f"its keys and values have one width, this model's {layer.key_width} and {layer.value_width}"
    return None


def _flash_obstacle(device_type: str, dtype: str, layers: Sequence[LayerAttention]) -> str | None:
    if device_type == "cpu" or dtype not in _HALF:
        return f"it runs on accelerators in 16 bits, not on {device_type} in {dtype}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    for layer in layers:
        if layer.window != layer.told_window:
            return (
                f"this model tells it a window of {layer.told_window or 'all'} tokens and the mask of other kernels "
                f"one of {layer.window or 'all'}"
            )
    return None
