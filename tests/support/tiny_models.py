"""Tiny random models and a real byte-level tokenizer, made in code: no download, a folder in under a second.

The tokenizer has about 280 tokens and every model 320 rows, so the padded vocabulary of real families is always there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PADDED_VOCABULARY = 320

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SENTENCES = [
    "the quick brown fox jumps over the lazy dog while the teacher reads what the student wrote",
    "a still turns a large wash into a small clear spirit, drop by drop",
]

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM has CPU attention for
    "max_position_embeddings": 512,
    "vocab_size": PADDED_VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1},  # its head_dim is derived
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {
        "model_type": "gemma2",
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}

EXPERTS = {
    # a window that only its mask knows of
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phimoe": {"model_type": "phimoe", "sliding_window": 16, "num_local_experts": 4},
    # a bias that balances the experts: in the checkpoint, and no parameter
    "glm4_moe": {
        "model_type": "glm4_moe",
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}
"""Mixtures of experts, for what they do otherwise than the families above."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<pad>`, `<|im_start|>` (1), `<|im_end|>` (2) and a ChatML template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=283,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_SENTENCES * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(
    family: str = "llama", *, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> torch.nn.Module:
    """A random causal LM of a family; weights wide enough that its distributions are far from uniform."""
    settings = {**SMALL, **(FAMILIES | EXPERTS)[family], "tie_word_embeddings": tied, **changes}
    config = AutoConfig.for_model(**settings)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25 if "embed" in name or "lm_head" in name else 0.15)
    torch.random.set_rng_state(state)
    return model.eval()


def tiny_folder(folder: Path, family: str = "llama", **options: object) -> Path:
    """A model folder with weights, tokenizer and chat template, as a user would have it on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(family, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
