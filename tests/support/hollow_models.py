"""Model folders of any size whose weights take no room: config.json, a tokenizer, and a safetensors file with its whole
table and a hole in place of the numbers."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch
from tiny_models import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}


def hollow_folder(folder: Path, settings: dict[str, object]) -> Path:
    """As if the model lay there in bfloat16."""
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    table, at = {}, 0
    left_out = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in left_out:
            size = 2 * prod(tensor.shape)
            table[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
            at += size
    head = json.dumps(table).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + at)
    return folder
