"""Attention over packed sequences: which kernels this project offers, and how each keeps sequences apart.

Several sequences lie one after another in one row of T tokens. No padding is computed, no token sees another sequence,
and no `[T, T]` mask is built.

    sdpa               torch's scaled_dot_product_attention, one call per sequence; every device, every dtype
    varlen             torch.nn.attention.varlen, one call per layer; accelerators, 16-bit
    flash_attention_2  the flash_attn package through transformers; accelerators, 16-bit

The first two are registered with transformers under names of their own and handle decoding with a KV cache too. What a
layer may see comes to them as its attention mask (`LayerMask`), which transformers' code of the architecture asks for
and hands to each layer: so a layer has the window that its architecture gives it, whatever its config says, and it
has the borders of the sequences even where it drops the other arguments of the forward. The third takes the borders as
keyword arguments of the model's forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from trainer.errors import ConfigError

IMPLEMENTATIONS = {
    "sdpa": "stillhouse_sdpa",
    "varlen": "stillhouse_varlen",
    "flash_attention_2": "flash_attention_2",
}
"""Our names (of the configuration) and what the model's `config._attn_implementation` is set to."""

DECODING = IMPLEMENTATIONS["sdpa"]
"""The implementation that `trainer/model/generate.py` switches to: it masks a left-padded batch with a KV cache."""

REFERENCE = "stillhouse_eager_in_blocks"
"""The eager attention of the model's own file, some queries at a time: what other kernels are held against."""

_SCORES_AT_ONCE = 2**26
"""Attention scores that the reference holds at a time: 256 MiB in float32, and a few copies."""

HARMLESS = frozenset(
    {
        "position_ids",
        "output_hidden_states",
        "use_cache",
        "is_causal",
        "sliding_window",  # the mask says it
        "output_attentions",
        "output_router_logits",
        "cache_position",
        "position_embeddings",
    }
)
"""Arguments of an attention function that say nothing beyond what it knows already."""

_KNOWN_MASKS = ("causal_mask_function", "sliding_window_overlay", "packed_sequence_mask_function")


@dataclass(frozen=True, slots=True, eq=False)
class Borders:
    """Where the sequences of a batch of tokens lie. Without any field: each row is one sequence without padding."""

    offsets: tuple[int, ...] | None = None  # [S + 1] of the sequences packed in the only row
    device_offsets: torch.Tensor | None = None  # int32 [S + 1]: the same on the device, for kernels that want it
    left_padding: torch.Tensor | None = None  # int64 [B]: of a batch that is decoded
    row_length: int | None = None  # tokens of each row so far, those in a KV cache included

    @property
    def longest(self) -> int:
        assert self.offsets is not None
        return max(stop - start for start, stop in pairwise(self.offsets))


@dataclass(frozen=True, slots=True, eq=False)
class LayerMask:
    """What the tokens of one layer see: of their own sequence, themselves and what is before them, in all at most
    `window` tokens."""

    window: int | None
    borders: Borders


ONE_A_ROW = Borders()

_BORDERS: ContextVar[Borders] = ContextVar("borders", default=ONE_A_ROW)


@contextmanager
def told(borders: Borders) -> Iterator[None]:
    """Inside, the masks that a model's forward asks for have these borders."""
    token = _BORDERS.set(borders)
    try:
        yield
    finally:
        _BORDERS.reset(token)


def border_arguments(name: str, offsets: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments for the forward of a `StudentModule` whose row of tokens holds sequences with these borders
    [S + 1]."""
    if name == "sdpa":
        return {"borders": Borders(offsets=tuple(offsets))}
    on_device = torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True)
    borders = Borders(offsets=tuple(offsets), device_offsets=on_device)
    if name == "varlen":
        return {"borders": borders}
    return {
        "cu_seq_lens_q": on_device,
        "cu_seq_lens_k": on_device,
        "max_length_q": borders.longest,
        "max_length_k": borders.longest,
    }


def layer_mask(
    *,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> LayerMask:
    """The contract of transformers' mask functions (`AttentionMaskInterface`): what a model asks for, once for all
    layers that share it. Raises `ConfigError` for a mask that packing does not cover."""
    unknown = [name for name in _parts(mask_function) if not name.startswith(_KNOWN_MASKS)]
    if attention_mask is not None:
        unknown.append("a mask of padding")
    if unknown:
        raise ConfigError(
            f"student.model: its attention is masked by {', '.join(unknown)}; packed training covers causal attention "
            "with or without a sliding window. Choose another student"
        )
    return LayerMask(window=local_size, borders=_BORDERS.get())


def _parts(mask_function: Callable[..., Any]) -> Iterator[str]:
    """Names of the functions whose conjunction a mask function of transformers is."""
    if not mask_function.__qualname__.startswith("and_masks."):
        yield mask_function.__qualname__
        return
    for cell in mask_function.__closure__ or ():
        for part in cell.cell_contents:
            yield from _parts(part)


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LayerMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The contract of transformers' attention functions: query [B, heads, Q, D], key and value [B, kv heads, K, D] ->
    [B, Q, heads, D].

    Where sequences are packed (B = 1) each attends to itself. Otherwise each row is one sequence, which continues a KV
    cache where K > Q; of its tokens so far the first ones may be padding.
    """
    mask = _checked(attention_mask, others)
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap}
    offsets = mask.borders.offsets
    if offsets is None:
        seen = _row_mask(query, key, mask)
        return _attend(query, key, value, seen, causal=seen is None, **options).transpose(1, 2), None
    lengths = [stop - start for start, stop in pairwise(offsets)]
    parts = []
    # split, not slices: its backward joins the pieces once instead of adding S gradients of full length.
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        seen = _window_mask(q.shape[2], mask.window, q.device)
        parts.append(_attend(q, k, v, seen, causal=seen is None, **options).transpose(1, 2))
    return torch.cat(parts, 1), None


def packed_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LayerMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As `packed_sdpa`, in one kernel call for all sequences."""
    mask = _checked(attention_mask, others)
    borders = mask.borders
    if borders.device_offsets is None:
        options = {"scaling": scaling, "dropout": dropout, "softcap": softcap}
        return packed_sdpa(module, query, key, value, mask, **options, **others)
    from torch.nn.attention.varlen import varlen_attn

    assert softcap is None, "choose_attention lets no such model through"
    assert not dropout, "choose_attention lets no such model through"
    # The kernel's window counts tokens to the left; transformers' counts the token itself too.
    window = (-1 if mask.window is None else mask.window - 1, 0)
    # [1, heads, T, D] -> [T, heads, D]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        borders.device_offsets,
        borders.device_offsets,
        borders.longest,
        borders.longest,
        scale=scaling,
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[None], None


def eager_in_blocks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """The model's own eager attention with transformers' own mask [B, 1, Q, K], as many queries at a time as memory
    allows: an independent reference for rows of any length."""
    plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if plain is None:
        raise ConfigError(f"{type(module).__module__} has no eager attention to compare with")
    rows = max(1, _SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * key.shape[2]))
    masks = attention_mask.split(rows, 2)
    parts = [plain(module, q, key, value, m, **arguments)[0] for q, m in zip(query.split(rows, 2), masks, strict=True)]
    return torch.cat(parts, 1), None


def _checked(attention_mask: Any, others: dict[str, Any]) -> LayerMask:
    """Arguments that change the mathematics and are unknown here must not be dropped."""
    unknown = unknown_arguments(others)
    if unknown or not isinstance(attention_mask, LayerMask):
        what = ", ".join(unknown) or "an attention mask of its own"
        raise ConfigError(
            f"student.model: its attention takes {what}, which packed training does not cover. Choose another"
        )
    return attention_mask


def unknown_arguments(others: dict[str, Any]) -> list[str]:
    """Names of the arguments of an attention function that mean something this file does not know."""
    return [name for name, value in others.items() if value is not None and name not in HARMLESS]


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


def _row_mask(query: torch.Tensor, key: torch.Tensor, mask: LayerMask) -> torch.Tensor | None:
    """Bool [B or 1, 1, Q, K] for rows whose last Q tokens are the queries; None where causal attention is the same.

    A sliding layer's cache may have dropped its oldest tokens, so keys are counted from the end of the row.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    window, left_padding, row_length = mask.window, mask.borders.left_padding, mask.borders.row_length
    if left_padding is None or row_length is None:
        assert num_queries in (1, num_keys), "several new tokens on top of a cache need left_padding"
        return _window_mask(num_keys, window, query.device) if num_queries == num_keys else None
    q = torch.arange(row_length - num_queries, row_length, device=query.device)
    k = torch.arange(row_length - num_keys, row_length, device=query.device)
    distance = q[:, None] - k[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    real = k[None, :] >= left_padding[:, None]
    # A padding query attends to itself, so that its softmax is over something; nobody reads the result.
    return (seen[None] & real[:, None] | (distance == 0)[None])[:, None]


for _name, _function in (("sdpa", packed_sdpa), ("varlen", packed_varlen)):
    AttentionInterface.register(IMPLEMENTATIONS[_name], _function)
    AttentionMaskInterface.register(IMPLEMENTATIONS[_name], layer_mask)
AttentionInterface.register(REFERENCE, eager_in_blocks)
AttentionMaskInterface.register(REFERENCE, eager_mask)
