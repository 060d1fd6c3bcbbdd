"""What the teacher itself answers to the prompts of the report, where no engine of the run writes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig

from configs.models import ModelSource
from trainer.errors import foreign_errors
from trainer.model.load import load_causal
from trainer.model.weights import weight_bytes

ANSWER_BYTES = 2**30
"""Teachers of more bytes of weights would keep the start of a run waiting."""


def teacher_answers(
    prompts: Sequence[np.ndarray], source: ModelSource, *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[np.ndarray] | None:
    """Greedy continuations by transformers in this process, int32, a stop token included; None where the teacher's
    weights are over `ANSWER_BYTES`. Leaves the random state as it was. Raises ConfigError with transformers' reason."""
    if weight_bytes(source) > ANSWER_BYTES:
        return None
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), foreign_errors("teacher.model: no answers"):
        model = load_causal(source, role="teacher.model", dtype=torch.float32, attn_implementation="eager").eval()
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=stop_ids[0] if stop_ids else 0,
        )
        return [_answer(model, prompt, settings) for prompt in prompts]


def _answer(model: torch.nn.Module, prompt: np.ndarray, settings: GenerationConfig) -> np.ndarray:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return written[0, len(prompt) :].numpy().astype(np.int32)
