"""Tiny models of every causal architecture that transformers knows and that can be built in code in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import SMALL, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 24

_NOT_TINY = ("gemma", "llama4", "mllama", "emu3", "qwen3_5", "got_ocr2", "phi4_multimodal", "blt", "bert", "git")
"""Beginnings of architectures whose config cannot be made tiny by the names of its fields."""

EVERY = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith(_NOT_TINY))

_NAMES = {
    **SMALL,
    "head_dim": 16,
    "sliding_window": WINDOW,  # of a third of the architectures; the others ignore it
    # the same under other names
    "d_model": 64,
    "n_embd": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "n_ctx": 512,
    "rotary_dim": 8,
    # experts
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # of one family each
    "dim_model_base": 32,
    "query_pre_attn_scalar": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 320,
}
"""Settings that are given to an architecture whose config has a field of that name."""

_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
_OWN: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "deepseek_v3": _LATENT,
    "longcat_flash": {**_LATENT, "num_layers": 1},
    "youtu": {**_LATENT, "pad_token_id": 300},  # transformers sets the embedding of padding to zero when it loads one
    "glm4_moe_lite": _LATENT,
    "deepseek_v2": _LATENT,
    "minicpm3": _LATENT,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gemma4_text": {"head_dim": None},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"word_embed_proj_dim": 32},
    "olmo": {"clip_qkv": 0.5},
    "zaya": {"num_experts_per_tok": 1},
}


def architecture_config(name: str, **changes: Any) -> PretrainedConfig:
    """A tiny config of a model type."""
    plain = CONFIG_MAPPING[name]
    fields = {*plain().to_dict(), *getattr(plain, "attribute_map", {})}
    always = {*SMALL, "sliding_window"} - {"head_dim"}
    settings = {key: value for key, value in _NAMES.items() if key in always or key in fields}
    settings |= _OWN.get(name, {})
    settings = {key: value for key, value in settings.items() if value is not None}
    return AutoConfig.for_model(name, **settings | changes)


def architecture_model(config: PretrainedConfig, *, seed: int = 0) -> torch.nn.Module:
    """A random model; weights wide enough that its distributions are far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.25 if "embed" in name or "lm_head" in name else 0.15)
    return model.eval()


def long_rope(original: int) -> dict[str, Any]:
    """Settings of a Phi-3 whose positions are rotated otherwise in rows of more than `original` tokens."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": original, **factors}
    return {"original_max_position_embeddings": original, "rope_parameters": rope}


def architecture_folder(
    folder: Path, name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Weights of a tiny model with the tokenizer of tiny_models.py, as a user would have them on disk."""
    architecture_model(architecture_config(name, **changes), seed=seed).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
