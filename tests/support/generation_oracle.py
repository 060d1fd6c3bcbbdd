"""What generation is held against: transformers' warpers over the logits of a second reading of the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from label_oracle import VOCABULARY
from transformers import (
    AutoModelForCausalLM,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainer.types import Completion, GenerationRequest, Sampling

PADDING = list(range(VOCABULARY, 320))
"""Rows of the tiny models' heads that are no token."""


def generation_requests(sampling: Sampling, *, n: int = 1) -> list[GenerationRequest]:
    """`n` answers to each of three prompts."""
    rng = np.random.default_rng(7)
    prompts = [(f"0:{length}", rng.integers(3, VOCABULARY, length).astype(np.int32)) for length in (9, 30, 4)]
    return [GenerationRequest(name, ids, sampling, sample=i, origin=name) for name, ids in prompts for i in range(n)]


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities [V] of what is drawn from, or at temperature 0 of the logits themselves."""
    scores = logits.double()[None]
    if sampling.temperature:
        scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
        scores = MinPLogitsWarper(sampling.min_p)(None, scores) if sampling.min_p else scores
        scores = TopKLogitsWarper(sampling.top_k)(None, scores) if sampling.top_k else scores
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return torch.log_softmax(scores, -1)[0]


@torch.no_grad()
def check_logprobs(
    folder: Path, requests: Sequence[GenerationRequest], completions: Sequence[Completion], *, atol: float = 1e-3
) -> None:
    """All tokens could be drawn, and have the log-probabilities that they are said to have."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.logprobs) == len(completion.token_ids) > 0
        ids = torch.tensor([*request.token_ids.tolist(), *completion.token_ids.tolist()])
        rows = model(ids[None]).logits[0, len(request.token_ids) - 1 : -1, :VOCABULARY]
        for row, token, logprob in zip(rows, completion.token_ids, completion.logprobs, strict=True):
            assert float(warped(row, request.sampling)[token]) == pytest.approx(float(logprob), abs=atol)
            if request.sampling.temperature == 0:
                assert int(row.argmax()) == token
