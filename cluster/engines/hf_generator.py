"""Generation by the transformers engine: one answer after the other, and what its tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from functools import cached_property

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluster.engines.hf_loop import SequenceLoop
from cluster.engines.plan import EnginePlan
from cluster.engines.units import EngineStatistics, check_request
from configs.models import ModelSource
from trainer.data.vocabulary import load_tokenizer
from trainer.errors import ConfigError
from trainer.types import Completion, FinishReason, GenerationRequest, Sampling, WeightBucket


class HfGenerator:
    """`RolloutEngine` (trainer/protocols.py)."""

    def __init__(self, plan: EnginePlan, model: PreTrainedModel, name: str) -> None:
        self._plan = plan
        self._model = model
        self._loop = SequenceLoop(name)
        self._version = plan.weights_version

    async def generate(self, requests: AbstractSequence[GenerationRequest], *, deadline_s: float) -> list[Completion]:
        """See the protocol."""
        for request in requests:
            check_request(request, vocabulary_size=self._plan.vocabulary_size, max_length=self._plan.max_length)
        completions = await self._loop.run(
            requests, self._completion, name=f"{len(requests)} answers", deadline_s=deadline_s
        )
        num_tokens = sum(len(request.token_ids) for request in requests) + sum(len(c.token_ids) for c in completions)
        self._loop.count(num_tokens=num_tokens, num_rows=0)
        return completions

    @torch.inference_mode()
    def _completion(self, request: GenerationRequest) -> Completion:
        sampling, device = request.sampling, self._model.device
        generator = torch.Generator(device).manual_seed(request.seed)
        stop_text = StopText(self._tokenizer, request) if sampling.stop else None
        token_ids, cache = torch.from_numpy(request.token_ids).long().to(device)[None], None
        written: list[int] = []
        logprobs: list[float] = []
        reason: FinishReason = "length"
        for _ in range(min(sampling.max_tokens, self._plan.max_length - len(request.token_ids))):
            output = self._model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logits = output.logits[0, -1, : self._plan.vocabulary_size].float()
            token, logprob = draw(logits, sampling, generator)
            written.append(token)
            logprobs.append(logprob)
            if token in sampling.stop_token_ids or (stop_text is not None and stop_text.completed_by(token)):
                reason = "stop"
                break
            token_ids = torch.tensor([[token]], device=device)
        return Completion(
            np.asarray(written, dtype=np.int32),
            np.asarray(logprobs, dtype=np.float32),
            reason,
            author=self._plan.author,
            versions=((0, self._version),),
        )

    async def take(self, bucket: WeightBucket, *, deadline_s: float) -> None:
        """See the protocol."""
        await self._loop.run([bucket], self._load, name="a bucket of weights", deadline_s=deadline_s)

    @torch.no_grad()
    def _load(self, bucket: WeightBucket) -> None:
        held = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        for name, array in bucket.weights.items():
            held[name].copy_(torch.from_numpy(array.copy()).view(getattr(torch, bucket.dtype)))
        if bucket.header.is_last:
            self._version = str(bucket.header.version)

    async def logprobs(self, token_ids: np.ndarray, *, deadline_s: float) -> np.ndarray:
        """See the protocol."""
        (found,) = await self._loop.run([token_ids], self._score, name="the probe", deadline_s=deadline_s)
        return found

    @torch.inference_mode()
    def _score(self, token_ids: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(token_ids).long().to(self._model.device)
        logits = self._model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0].cpu().numpy()

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        plan = self._plan
        source = ModelSource(path=plan.model, revision=plan.revision, trust_remote_code=plan.trust_remote_code)
        tokenizer = load_tokenizer(source)
        if not tokenizer.is_fast:
            raise ConfigError(f"{plan.model} has no tokenizer.json, which stop strings need here; write engine: vllm")
        return tokenizer

    def statistics(self) -> EngineStatistics:
        return self._loop.statistics()

    def close(self) -> None:
        self._loop.close()


class StopText:
    """Reads an answer token by token until it holds one of the stop strings: without special tokens, as it continues
    the prompt, and a character only when all of its bytes are there. vLLM reads answers in this way."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, request: GenerationRequest) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=request.token_ids.tolist(), skip_special_tokens=True)
        self._stop = request.sampling.stop
        self._text = ""

    def completed_by(self, token: int) -> bool:
        new = self._stream.step(self._tokenizer, token) or ""
        before = max(map(len, self._stop)) - 1  # characters in which a stop string may have begun
        self._text = self._text[-before:] + new if before else new
        return any(stop in self._text for stop in self._stop)


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, float]:
    """One id from float32 logits [V], and its log-probability in the distribution that it was drawn from; greedy, the
    likeliest id and its log-probability at temperature 1."""
    if sampling.temperature == 0:
        best = int(logits.argmax())
        return best, float(torch.log_softmax(logits, dim=-1)[best])
    probabilities, ids = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True)
    kept = restrict(probabilities, sampling)
    place = torch.multinomial(kept, 1, generator=generator)
    return int(ids[place]), float(kept[place].log() - kept.sum().log())


def restrict(probabilities: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [V] in falling order, with 0 for the tokens that `sampling` excludes. Tokens as likely as the k-th
    stay, and the mass of `top_p` is that of the tokens which are left by then: both as in vLLM."""
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities[0], 0.0)
    if 0 < sampling.top_k < len(probabilities):
        probabilities = probabilities.masked_fill(probabilities < probabilities[sampling.top_k - 1], 0.0)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p * probabilities.sum(), 0.0)
    return probabilities
