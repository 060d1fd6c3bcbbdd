"""What in a transformers config counts layers or names them, which no library knows: for `trainer/model/prune.py`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# One entry per layer, where the config gives a list of as many entries as layers.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "indexer_types",
    "layers_block_type",
    "hybrid_override_pattern",
    "block_configs",
    "no_rope_layers",
    "layer_rope_theta",
    "intermediate_size",
    "num_attention_heads",
    "num_attention_heads_per_layer",
    "num_key_value_heads",
    "activation_sparsity_pattern",
)
# Lists of layer indices.
_LAYER_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers")
# Counts of layers at the beginning that are of another kind.
_LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# Settings of single layers by index.
_BY_INDEX = ("per_layer_config",)
# What in a config may decide by a layer's index, or by the number of layers, what the layer is.
_INDEX_RULE = re.compile(
    r"layer(?!_norm|norm|s?$|drop)|_period|_offset|_interval|_step$|_freq|_pattern|scale_depth|first_k|every_n"
)


def keep_config(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Change `config` in place to describe only `layers`, as far as is known how."""
    before = config.num_hidden_layers
    changes: dict[str, object] = {"num_hidden_layers": len(layers)}
    stored = config.to_dict()
    for name in _PER_LAYER:
        value = stored.get(name)
        if isinstance(value, (list, tuple)) and len(value) == before:
            changes[name] = [value[i] for i in layers]
        elif isinstance(value, str) and len(value) == before:
            changes[name] = "".join(value[i] for i in layers)
    for name in _LAYER_INDICES:
        value = stored.get(name)
        if isinstance(value, (list, tuple)):
            changes[name] = [new for new, old in enumerate(layers) if old in value]
    for name in _BY_INDEX:
        value = {str(key): setting for key, setting in (stored.get(name) or {}).items()}
        if value:
            changes[name] = {str(new): value[str(old)] for new, old in enumerate(layers) if str(old) in value}
    for name in _LEADING:
        value = stored.get(name)
        if isinstance(value, int):
            changes[name] = sum(old < value for old in layers)
    for name, value in changes.items():
        setattr(config, name, value)


def index_rules(config: PreTrainedConfig) -> list[str]:
    """`name: value` of settings that may decide what a layer computes by its index or by the number of layers."""
    return [
        f"{name}: {value!r}"
        for name, value in config.to_dict().items()
        if _INDEX_RULE.search(name) and value not in (None, False, 0, 1) and isinstance(value, int | float | str)
    ]
