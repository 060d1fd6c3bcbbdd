"""Greedy decoding by the student itself, so that a report can show what it says before and after.

A plain loop over a left-padded batch with a KV cache. It goes through the same module call as training, which is what
makes it work where parameters are sharded: all ranks run the same forwards and take rank 0's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import DynamicCache

from trainer.model.attention import DECODING, Borders
from trainer.model.collectives import broadcast
from trainer.model.head import Head
from trainer.model.load import StudentModule


@torch.no_grad()
def generate(
    module: StudentModule,
    forward: Callable[..., tuple[torch.Tensor, ...]],
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    vocabulary_size: int,
    device: torch.device,
) -> list[np.ndarray]:
    """Most probable continuations as int32 ids, a stop token included; collective, with equal arguments on all ranks.

    `forward` is `module`'s, or that of the `ZeroModel` around it, in evaluation mode. Padding ids are never chosen.
    """
    if not prompts or not max_new_tokens:
        return [np.empty(0, dtype=np.int32) for _ in prompts]
    tokens, padding = _pad_left(prompts, device)

    def choose(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor]:
        return (Head(weight, bias, module.head_shape, vocabulary_size).logits(hidden).argmax(-1),)

    cache = DynamicCache(config=module.config)
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    row_length = tokens.shape[1]
    positions = (torch.arange(row_length, device=device) - padding[:, None]).clamp(min=0)
    chosen = []
    with _decoding(module):
        while len(chosen) < max_new_tokens and not bool(done.all()):
            last = torch.arange(1, len(prompts) + 1, device=device) * tokens.shape[1] - 1
            borders = Borders(left_padding=padding, row_length=row_length)
            (following,) = forward(tokens, positions, last, choose, past_key_values=cache, borders=borders)
            chosen.append(broadcast(following))
            done |= torch.isin(following, stops)
            tokens, positions, row_length = following[:, None], positions[:, -1:] + 1, row_length + 1
    return [_until_stop(row, stop_ids) for row in torch.stack(chosen, 1).cpu().numpy().astype(np.int32)]


@contextmanager
def _decoding(module: StudentModule) -> Iterator[None]:
    """The attention that a KV cache needs, in place of that of training."""
    used, module.config._attn_implementation = module.config._attn_implementation, DECODING
    try:
        yield
    finally:
        module.config._attn_implementation = used


def _pad_left(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, longest] ids and int64 [B] padding in front of each."""
    longest = max(map(len, prompts))
    rows = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    return torch.from_numpy(rows).to(device), padding.to(device)


def _until_stop(tokens: np.ndarray, stop_ids: tuple[int, ...]) -> np.ndarray:
    stopped = np.flatnonzero(np.isin(tokens, stop_ids))
    return tokens[: stopped[0] + 1] if stopped.size else tokens
