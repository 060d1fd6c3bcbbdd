"""What a model is asked to write, and what it wrote."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of an answer are drawn: logits are divided by the temperature, then restricted by `min_p`, `top_k`
    and `top_p`, in this order."""

    max_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # the smallest set of likeliest tokens of this mass (nucleus sampling, arXiv 1904.09751)
    top_k: int = 0  # the k likeliest tokens; 0: all
    min_p: float = 0.0  # tokens at least this fraction as likely as the likeliest (arXiv 2407.01082)
    stop: tuple[str, ...] = ()  # a text ends with the token that completes one of these strings
    stop_token_ids: tuple[int, ...] = ()  # a text ends with one of these
    seed: int = 0  # of the task; every answer is drawn with its own, `sample_seed`


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One answer to one prompt. Its seed depends on nothing else, so that a retry is drawn with the same numbers."""

    prompt_id: str
    token_ids: np.ndarray  # int32 [L], generation header included
    sampling: Sampling
    sample: int = 0  # which of the answers to its prompt
    origin: str = ""  # of the prompt, for messages

    @property
    def id(self) -> str:
        return sequence_id(self.prompt_id, self.sample)

    @property
    def seed(self) -> int:
        return sample_seed(self.sampling.seed, self.prompt_id, self.sample)


FinishReason = Literal["stop", "length", "abort"]
"""Why an answer ends: at a stop token or string, at `max_tokens` or the length of the engine, or cut by the engine."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote to a request."""

    token_ids: np.ndarray  # int32 [T], without the prompt, the stop token included
    logprobs: np.ndarray  # float32 [T], of each token in the distribution it was drawn from; greedy: at temperature 1
    finish_reason: FinishReason
    author: str  # "teacher", or "teacher:<name>" where there are several
    versions: tuple[tuple[int, str], ...]  # first token and weights version of each span that one version wrote


def sequence_id(prompt_id: str, sample: int) -> str:
    """Unique in a step."""
    return f"{prompt_id}#{sample}" if sample else prompt_id


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """32 bits, of one answer: it does not depend on what else is in a batch or which replica writes it."""
    digest = hashlib.blake2b(f"{seed}:{sequence_id(prompt_id, sample)}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
