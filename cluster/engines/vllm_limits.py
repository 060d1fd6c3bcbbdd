"""Where vLLM computes another model than transformers does, or cannot split it: refused, or set right by overrides;
and what its KV cache takes at least.

Decided from a model's configuration alone; vLLM itself is not imported.
"""

from __future__ import annotations

from typing import Any

from configs.engines import Vllm
from configs.rules import teacher_place
from configs.schema import Run
from trainer.errors import ConfigError
from trainer.model.attention_choice import ignores_window, refuse_changing_rope, refuse_silent_windows

WIDER_IN_VLLM = ("cohere2",)
"""Architectures whose layers see one token more in vLLM 0.32 (its commandr.py says why) than in transformers."""


def check_split(run: Run, name: str, teacher_config: Any) -> None:
    """vLLM splits a model by attention heads. Raises `ConfigError` where tensor_parallel_size does not divide them."""
    text = teacher_config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    shared = getattr(text, "num_key_value_heads", None) or heads
    for role, replicas in run.teachers_by_name()[name].roles().items():
        shards = replicas.tensor_parallel_size
        if not heads or shards == 1:
            continue
        place = f"{teacher_place(run, name)}.{role}.tensor_parallel_size: {shards}"
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
        if heads % shards:
            raise ConfigError(f"{place} does not divide the teacher's {heads} attention heads; write one of {fitting}")
        if shards not in fitting:
            raise ConfigError(
                f"{place} neither divides the teacher's {shared} key-value heads nor is a multiple of them; write one "
                f"of {fitting}"
            )


def check_rotation(run: Run, name: str, teacher_config: Any) -> None:
    """Raises `ConfigError` where vLLM would rotate positions, or see a window, otherwise than transformers' model of
    the teacher."""
    teacher = run.teachers_by_name()[name]
    if any(isinstance(replicas.engine, Vllm) for replicas in teacher.roles().values()):
        why = "vLLM rotates every row as it would the longest, transformers each by its own length"
        refuse_changing_rope(teacher_config, max_length=run.data.max_length, role="teacher", why=why)
        trusted = teacher.model.trust_remote_code
        refuse_silent_windows(teacher_config, max_length=run.data.max_length, trust_remote_code=trusted)


def check_cache(run: Run, name: str, teacher_config: Any) -> None:
    """Raises `ConfigError` where `kv_cache_bytes` is too little for one sequence of data.max_length, which vLLM refuses
    when it starts. Layers that cache by a window or otherwise are not counted."""
    for role, replicas in run.teachers_by_name()[name].roles().items():
        given = replicas.engine.kv_cache_bytes if isinstance(replicas.engine, Vllm) else None
        if given is None:
            continue
        dtype = "float32" if replicas.dtype == "float32" else "bfloat16"  # auto: the least that it can be
        needed = kv_cache_bytes(teacher_config, num_tokens=run.data.max_length, dtype=dtype)
        if needed is None or getattr(teacher_config.get_text_config(), "sliding_window", None):
            continue
        least = -(-needed // replicas.tensor_parallel_size)
        if given < least:
            place = f"{teacher_place(run, name)}.{role}.engine.kv_cache_bytes"
            raise ConfigError(
                f"{place}: {given} holds no sequence of data.max_length: {run.data.max_length} tokens, whose keys and "
                f"values take {least} bytes in {dtype}; write at least that, or leave it out"
            )


def vllm_overrides(config: Any, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """`hf_overrides` by which vLLM's layers see as far back as those of transformers' model do, and labels are those of
    one model: it gives a `sliding_window` to architectures that have none, and to some another than transformers."""
    text = config.get_text_config()
    if ignores_window(config, role="teacher.model", trust_remote_code=trust_remote_code):
        window = {"sliding_window": None}
    elif text.model_type in WIDER_IN_VLLM and text.sliding_window is not None:
        window = {"sliding_window": text.sliding_window - 1}
    else:
        return {}
    return window if text is config else {"text_config": window}


ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
"""Of `layer_types`: those whose cache is keys and values of every token."""


def kv_cache_bytes(config: Any, *, num_tokens: int, dtype: str) -> int | None:
    """What the keys and values of so many tokens take, in blocks of `dtype`; None for a model with layers of another
    kind, of different widths, or another kind of attention."""
    text = config.get_text_config()
    try:
        heads = getattr(text, "num_attention_heads", None)
        shared = getattr(text, "num_key_value_heads", None) or heads
        layers = getattr(text, "num_hidden_layers", None)
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
    except (RuntimeError, TypeError, AttributeError):  # each layer has its own, as in Gemma 4; or there are no heads
        return None
    if not heads or not layers or getattr(text, "kv_lora_rank", None):
        return None
    if not set(getattr(text, "layer_types", None) or ()) <= ATTENTION_LAYERS:
        return None
    return 2 * layers * shared * width * {"float32": 4, "bfloat16": 2}[dtype] * num_tokens
