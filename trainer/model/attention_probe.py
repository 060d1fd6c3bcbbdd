"""What the layers of a model ask of their attention, seen by running transformers' own code without weights.

A config says less than it seems to: a Llama ignores `sliding_window`, an OLMo-3 uses it in some layers, the heads of
multi-head latent attention have two widths. So the model is built on the meta device, where nothing is stored or
computed, and each layer runs up to its call of the attention function, which notes what it was called with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache

from trainer.errors import ConfigError, foreign_errors
from trainer.model.attention import LayerMask, layer_mask, unknown_arguments

_PROBE = "stillhouse_probe"
_TOKENS = 2


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's call."""

    window: int | None  # tokens a token sees, itself included; None: all before it
    told_window: int | None  # the same, as the layer tells kernels that take no mask
    key_width: int  # of one head
    value_width: int
    soft_cap: float | None
    unknown: tuple[str, ...]  # arguments that mean something trainer/model/attention.py does not know


class _Called(Exception):
    """Ends a layer at its attention: what follows, a mixture of experts for example, cannot run without numbers."""

    def __init__(self, seen: LayerAttention) -> None:
        super().__init__()
        self.seen = seen


def layer_attention(config: Any, *, role: str, trust_remote_code: bool = False) -> tuple[LayerAttention | None, ...]:
    """What each decoder layer of a model with this transformers config asks for, in order; None: no attention.

    Raises `ConfigError` naming `role` (such as "student.model") where transformers cannot build the model, or where its
    code does more with masks than hand them to its layers.
    """
    config = copy.deepcopy(config)
    kind = config.model_type
    with foreign_errors(f"{role}: transformers cannot build a {kind} from its configuration"), torch.device("meta"):
        try:
            causal = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation=_PROBE
            ).eval()
        except KeyError as missing:
            if missing.args == (_PROBE,):  # looked up in a table of its own: Falcon, GPT-J, GPT-Neo
                raise ConfigError(f"{role}: a {kind} does not let others compute its attention") from None
            raise
    if not causal._supports_attention_backend:
        raise ConfigError(f"{role}: {type(causal).__name__} does not let others compute its attention")
    # Else some models look for padding among token ids, which have no values here.
    vars(causal.config)["pad_token_id"] = None
    for module in causal.modules():
        if isinstance(kinds := getattr(module, "rope_type", None), (str, dict)):  # some look at the largest position
            module.rope_type = "default" if isinstance(kinds, str) else dict.fromkeys(kinds, "default")
    found: list[LayerAttention | None] = []
    for layer in _layers_of(causal.base_model):
        layer.forward = _until_attention(layer.forward, found)
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    doing = f"{role}: the attention of a {kind} is not of the kind that transformers lets others compute"
    with foreign_errors(doing), torch.no_grad():
        # With a cache, because without one the masks look for borders in the position ids, which have no values here.
        causal.base_model(input_ids=tokens, past_key_values=DynamicCache(config=causal.config), use_cache=True)
    return tuple(found)


def _layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What the outermost lists of modules hold: the decoder layers. What has no parameters is a rotary embedding."""
    found: list[torch.nn.Module] = []
    for child in model.children():
        found += child if isinstance(child, torch.nn.ModuleList) else _layers_of(child)
    return [layer for layer in found if next(layer.parameters(), None) is not None]


def _until_attention(forward: Callable[..., Any], found: list[LayerAttention | None]) -> Callable[..., Any]:
    def until(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            forward(hidden, *args, **kwargs)
        except _Called as called:
            found.append(called.seen)
        else:
            found.append(None)
        return hidden

    return until


def _note(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    unknown = unknown_arguments(others)
    if not isinstance(attention_mask, LayerMask):
        unknown.append("an attention mask of its own")
    raise _Called(
        LayerAttention(
            window=attention_mask.window if isinstance(attention_mask, LayerMask) else None,
            told_window=sliding_window,
            key_width=key.shape[-1],
            value_width=value.shape[-1],
            soft_cap=softcap,
            unknown=tuple(unknown),
        )
    )


AttentionInterface.register(_PROBE, _note)
AttentionMaskInterface.register(_PROBE, layer_mask)
