"""Generation by the vLLM engine: requests of several calls stream through its running batch."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from cluster.engines.plan import EnginePlan
from cluster.engines.units import EngineStatistics, check_request
from cluster.engines.vllm_loop import EngineLoop, Request
from cluster.engines.vllm_weights import WeightUpdates
from trainer.types import Completion, FinishReason, GenerationRequest, Sampling, WeightBucket

if TYPE_CHECKING:
    from vllm import SamplingParams

FORBID = -100.0
"""The strongest logit bias vLLM accepts: keeps the padding of a vocabulary out of what a generator writes."""


class VllmGenerator:
    """`RolloutEngine` (trainer/protocols.py)."""

    def __init__(self, plan: EnginePlan, loop: EngineLoop) -> None:
        self._plan = plan
        self.loop = loop
        self._version = plan.weights_version
        self._updates = WeightUpdates()
        padding = range(plan.vocabulary_size, loop.padded_vocabulary_size)
        self._without_padding = dict.fromkeys(padding, FORBID) or None

    async def generate(self, requests: AbstractSequence[GenerationRequest], *, deadline_s: float) -> list[Completion]:
        """See the protocol."""
        for request in requests:
            check_request(request, vocabulary_size=self._plan.vocabulary_size, max_length=self._plan.max_length)
        if not requests:
            return []
        version = self._version
        finished = await self.loop.submit(
            [Request(request.token_ids.tolist(), self._params(request)) for request in requests],
            name=f"{len(requests)} answers from that to {requests[0].id} on",
            num_tokens=sum(len(request.token_ids) for request in requests),
            num_rows=0,
            deadline_s=deadline_s,
        )
        return [self._completion(output.outputs[0], version) for output in finished.outputs]

    def _params(self, request: GenerationRequest) -> SamplingParams:
        sampling = request.sampling
        return sampling_params(
            sampling,
            max_tokens=min(sampling.max_tokens, self._plan.max_length - len(request.token_ids)),
            seed=request.seed,
            logit_bias=self._without_padding,
        )

    async def take(self, bucket: WeightBucket, *, deadline_s: float) -> None:
        """See the protocol."""
        header = bucket.header
        name = f"bucket {header.index + 1} of {header.count} of the weights after step {header.version}"
        if await self.loop.run(lambda engine: self._updates.take(engine, bucket), name=name, deadline_s=deadline_s):
            self._version = str(header.version)

    async def logprobs(self, token_ids: np.ndarray, *, deadline_s: float) -> np.ndarray:
        """See the protocol."""
        from vllm import SamplingParams

        ids = token_ids.tolist()
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, ignore_eos=True)
        finished = await self.loop.submit(
            [Request(ids, params)], name="the probe", num_tokens=len(ids), num_rows=0, deadline_s=deadline_s
        )
        rows = finished.outputs[0].prompt_logprobs[1:]
        return np.asarray([row[token].logprob for row, token in zip(rows, ids[1:], strict=True)], dtype=np.float32)

    def _completion(self, output: Any, version: str) -> Completion:
        """Of vLLM's `CompletionOutput`, of a text that was begun with the weights of `version`. What ends for a reason
        that we do not ask for is aborted."""
        token_ids = np.asarray(output.token_ids, dtype=np.int32)
        logprobs = np.asarray(output.logprobs.logprobs, dtype=np.float32)
        return Completion(
            token_ids,
            logprobs,
            output.finish_reason if output.finish_reason in get_args(FinishReason) else "abort",
            author=self._plan.author,
            versions=((0, version),),
        )

    def statistics(self) -> EngineStatistics:
        return self.loop.statistics

    def close(self) -> None:
        self.loop.close()


def sampling_params(
    sampling: Sampling, *, max_tokens: int, seed: int, logit_bias: dict[int, float] | None
) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed if sampling.temperature > 0 else None,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        logprobs=0,  # of the drawn token alone
        flat_logprobs=True,
        logit_bias=logit_bias,
        ignore_eos=True,  # stop_token_ids says all there is to say
        detokenize=bool(sampling.stop),
    )
