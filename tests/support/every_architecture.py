"""A tiny random model of each causal architecture of transformers that gets by with the sizes below: about 160."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
VOCABULARY = 320
_LARGEST = 5_000_000  # parameters; what stays larger has parts that these sizes do not reach

# fmt: off
_SIZES = {
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
    512: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    128: (
        "intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "ffn_hidden_size", "encoder_ffn_dim",
        "decoder_ffn_dim", "mlp_hidden_size", "intermediate_size_mlp",
    ),
    64: (
        "hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "embed_dim", "dim_model",
        "emb_dim", "attention_hidden_size", "lru_width", "mamba_d_ssm",
    ),
    32: (
        "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "expert_ffn_size",
        "shared_intermediate_size", "moe_shared_expert_intermediate_size", "mamba_d_head", "mamba_head_dim",
    ),
    16: (
        "head_dim", "attention_head_dim", "global_head_dim", "swa_head_dim", "swa_v_head_dim", "dim_head",
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "o_lora_rank", "index_head_dim",
        "mamba_d_state", "ssm_state_size", "state_size", "linear_key_head_dim", "linear_value_head_dim",
        "hidden_size_per_layer_input", "sliding_window", "attention_window_size",
        "attention_chunk_size",
    ),
    8: ("qk_rope_head_dim", "index_topk", "time_step_rank", "mamba_dt_rank", "laurel_rank"),
    LAYERS: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks",
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "swa_num_attention_heads", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
        "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads",
    ),
    2: (
        "num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads", "num_experts_per_tok",
        "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_topk", "zero_expert_num",
        "o_groups", "index_n_heads", "n_mamba_heads", "linear_num_key_heads", "type_vocab_size", "altup_num_inputs",
        "eos_token_id",
    ),
    1: (
        "n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "mamba_n_groups",
        "n_groups", "bos_token_id",
    ),
    0: ("pad_token_id", "altup_active_idx"),
}
# fmt: on
_LATENT = {"axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"}
"""Whose keys are expanded to as many heads as there are queries."""

ARCHITECTURES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_config(name: str, **changes: object) -> PreTrainedConfig:
    """Raises whatever the architecture's own checks of its configuration raise."""
    config = CONFIG_MAPPING[name]
    known: set[str] = set()
    for part in config.__mro__:
        known |= set(getattr(part, "__annotations__", {}))
        if "__init__" in part.__dict__:
            known |= set(inspect.signature(part.__init__).parameters)
    sizes = {key: size for size, keys in _SIZES.items() for key in keys if key in known}
    if name in _LATENT:
        sizes |= {"num_key_value_heads": sizes["num_attention_heads"], "head_dim": sizes["qk_rope_head_dim"]}
    return config(**{**sizes, **changes})


def tiny_architecture(name: str, **changes: object) -> PreTrainedModel | None:
    """The model in float32, its distributions far from uniform; None for one that these sizes do not build."""
    model = None
    with contextlib.suppress(Exception):  # each architecture refuses sizes in a way of its own
        config = tiny_config(name, **changes)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size <= _LARGEST:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = _random_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    return model


@torch.no_grad()
def _random_weights(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.1)
    return model


def save_architecture(folder: Path, name: str, **changes: object) -> PreTrainedModel | None:
    model = tiny_architecture(name, **changes)
    if model is not None:
        model.save_pretrained(folder)
    return model
