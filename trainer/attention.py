"""Attention over packed sequences: which kernels this project offers, and how each keeps sequences apart.

Several sequences lie one after another in one row of T tokens. No padding is computed, no token sees another sequence,
and no `[T, T]` mask is built. The borders reach the attention as keyword arguments of the model's forward
(`border_arguments`), which transformers hands through to every attention layer.

    sdpa               torch's scaled_dot_product_attention, one call per sequence; every device, every dtype
    varlen             torch.nn.attention.varlen, one call per layer; accelerators, 16-bit
    flash_attention_2  the flash_attn package through transformers; accelerators, 16-bit

The first two are registered with transformers under names of their own and handle decoding with a KV cache too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trainer.errors import ConfigError

IMPLEMENTATIONS = {
    "sdpa": "stillhouse_sdpa",
    "varlen": "stillhouse_varlen",
    "flash_attention_2": "flash_attention_2",
}
"""Our names (of the configuration) and what the model's `config._attn_implementation` is set to."""

DECODING = IMPLEMENTATIONS["sdpa"]
"""The implementation that `trainer/generate.py` switches to: it masks a left-padded batch with a KV cache."""

UNSAID = -1
"""For `sliding_window`, where None says that there is none."""

_HALF = {"float16", "bfloat16"}
_VARLEN_MAX_HEAD = 256


def choose_attention(requested: str, *, device_type: str, dtype: str, config: Any) -> str:
    """The attention to use for a model with this transformers config; `requested` "auto" takes the fastest that fits.

    `device_type` and `dtype` are those of the student (`StudentPlan`), which need not exist on this machine. Raises
    `ConfigError` where the model attends in a way that packing does not cover, or the named kernel does not fit.
    """
    text = config.get_text_config()
    _refuse_unknown_attention(text)
    if requested == "auto":
        return "sdpa" if _varlen_obstacle(device_type, dtype, text) else "varlen"
    if requested == "sdpa":
        return requested
    if requested == "varlen":
        obstacle = _varlen_obstacle(device_type, dtype, text)
    elif requested == "flash_attention_2":
        obstacle = _flash_obstacle(device_type, dtype)
    else:
        obstacle = f"there is no such attention; there are {', '.join(IMPLEMENTATIONS)}"
    if obstacle:
        raise ConfigError(f"student.attention: {requested}: {obstacle}. Write attention: auto")
    return requested


def border_arguments(name: str, offsets: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments for the forward of a model whose row of tokens holds sequences with these borders [S + 1]."""
    if name == "sdpa":
        return {"sequence_offsets": tuple(offsets)}
    borders = torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True)
    longest = max(stop - start for start, stop in pairwise(offsets))
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def _refuse_unknown_attention(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if getattr(config, "attention_chunk_size", None):
        kinds.add("chunked_attention")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        kinds.add("bidirectional attention")
    if kinds:
        raise ConfigError(
            f"student.model: {config.model_type} uses {', '.join(sorted(kinds))}; packed training covers causal "
            "attention with or without a sliding window. Choose another student"
        )


def refuse_length_dependent_rope(config: Any, *, max_length: int) -> None:
    """Rotations that change for the whole row once one position passes the original length (LongRoPE, dynamic NTK)
    would depend on what a sequence is packed with. Raises `ConfigError` where `max_length` lets that happen."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if one.get("rope_type") not in ("longrope", "dynamic"):
            continue
        original = (
            one.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
            or text.max_position_embeddings
        )
        if max_length > original:
            raise ConfigError(
                f"data.max_length: {max_length} is over the {original} positions after which the student's rotary "
                f"embedding ({one['rope_type']}) changes for all of a packed row; write at most {original}"
            )


def _varlen_obstacle(device_type: str, dtype: str, config: Any) -> str | None:
    if _is_host(device_type) or dtype not in _HALF:
        return f"it runs on accelerators in 16 bits, not on {device_type} in {dtype}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} does not have it"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it cannot soft-cap attention scores as this model does"
    if getattr(config, "attention_dropout", 0.0):
        return "it has no attention dropout"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head > _VARLEN_MAX_HEAD:
        return f"its heads may have {_VARLEN_MAX_HEAD} dimensions, this model's have {head}"
    return None


def _flash_obstacle(device_type: str, dtype: str) -> str | None:
    if _is_host(device_type) or dtype not in _HALF:
        return f"it runs on accelerators in 16 bits, not on {device_type} in {dtype}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    return None


def _is_host(device_type: str) -> bool:
    return device_type == torch.empty(0).device.type


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = UNSAID,
    softcap: float | None = None,
    sequence_offsets: Sequence[int] | None = None,
    left_padding: torch.Tensor | None = None,
    row_length: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The contract of transformers' attention functions: query [B, heads, Q, D], key and value [B, kv heads, K, D] ->
    [B, Q, heads, D].

    With `sequence_offsets` (B = 1) each sequence attends to itself. Without, each row is one sequence, which continues
    a KV cache where K > Q; of its `row_length` tokens so far the first `left_padding` int64 [B] are padding.
    """
    _refuse_extras(others, attention_mask)
    sliding_window = _window(module, sliding_window)
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap}
    if sequence_offsets is None:
        mask = _row_mask(query, key, sliding_window, left_padding, row_length)
        return _attend(query, key, value, mask, causal=mask is None, **options).transpose(1, 2), None
    lengths = [stop - start for start, stop in pairwise(sequence_offsets)]
    parts = []
    # split, not slices: its backward joins the pieces once instead of adding S gradients of full length.
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        parts.append(_attend(q, k, v, mask, causal=mask is None, **options).transpose(1, 2))
    return torch.cat(parts, 1), None


def packed_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = UNSAID,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As `packed_sdpa`, in one kernel call for all sequences. `cu_seq_lens_q` int32 [S + 1]."""
    if cu_seq_lens_q is None:
        return packed_sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            **others,
        )
    from torch.nn.attention.varlen import varlen_attn

    _refuse_extras(others, attention_mask)
    assert softcap is None, "choose_attention lets no such model through"
    assert not dropout, "choose_attention lets no such model through"
    sliding_window = _window(module, sliding_window)
    # The kernel's window counts tokens to the left; transformers' counts the token itself too.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    # [1, heads, T, D] -> [T, heads, D]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        scale=scaling,
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[None], None


def _window(module: torch.nn.Module, given: int | None) -> int | None:
    """The window a layer asks for; of an architecture that says it in its mask alone, that of its configuration."""
    if given != UNSAID:
        return given
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and layer is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _refuse_extras(others: dict[str, Any], attention_mask: torch.Tensor | None) -> None:
    """Arguments that change the mathematics and are unknown here must not be dropped."""
    known_harmless = {
        "position_ids",
        "use_cache",
        "is_causal",
        "output_attentions",
        "output_router_logits",
        "cache_position",
        "position_embeddings",
    }
    unknown = [name for name, value in others.items() if value is not None and name not in known_harmless]
    if unknown or attention_mask is not None:
        what = ", ".join(unknown) or "an attention mask of its own"
        raise ConfigError(
            f"student.model: its attention takes {what}, which packed training does not cover. Choose another"
        )


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """One attention with one mask: bool [B or 1, 1, Q, K] True where attended, or None with `causal`."""
    if softcap is not None:
        return _attend_soft_capped(query, key, value, mask, scaling=scaling, dropout=dropout, softcap=softcap)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float,
    softcap: float,
) -> torch.Tensor:
    """Scores c * tanh(s / c) before the softmax (Gemma 2, arXiv 2408.00118, section 2); no fused kernel offers it."""
    batch, heads, num_queries, width = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, num_queries, width)
    scores = torch.einsum("bghqd,bgkd->bghqk", grouped, key) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        mask = mask[None, None]
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
    return torch.einsum("bghqk,bgkd->bghqd", weights, value).reshape(batch, heads, num_queries, -1)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Bool [1, 1, L, L] of a causal sliding window; None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return (ones.tril() & ~ones.tril(-window))[None, None]


def _row_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    window: int | None,
    left_padding: torch.Tensor | None,
    row_length: int | None,
) -> torch.Tensor | None:
    """Bool [B or 1, 1, Q, K] for rows whose last Q tokens are the queries; None where causal attention is the same.

    A sliding layer's cache may have dropped its oldest tokens, so keys are counted from the end of the row.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if left_padding is None:
        assert num_queries in (1, num_keys), "several new tokens on top of a cache need left_padding"
        return _window_mask(num_keys, window, query.device) if num_queries == num_keys else None
    q = torch.arange(row_length - num_queries, row_length, device=query.device)
    k = torch.arange(row_length - num_keys, row_length, device=query.device)
    distance = q[:, None] - k[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    real = k[None, :] >= left_padding[:, None]
    # A padding query attends to itself, so that its softmax is over something; nobody reads the result.
    return (seen[None] & real[:, None] | (distance == 0)[None])[:, None]


AttentionInterface.register(IMPLEMENTATIONS["sdpa"], packed_sdpa)
AttentionInterface.register(IMPLEMENTATIONS["varlen"], packed_varlen)
