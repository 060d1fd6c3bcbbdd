"""One vLLM engine as a worker of `benchmarks scoring`: our scorer, or vLLM as it comes, and what a batch costs.

The engine runs inside this process, so the process's own CPU time is all there is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cpu_time import CpuTime, of_this_process
from cluster.engines.plan import EnginePlan
from cluster.engines.vllm import Engine, build_engine
from cluster.engines.vllm_loop import EngineLoop, Request
from configs.labels import Labels
from trainer.types import RowIds, Unit

DEADLINE_S = 1800.0


@dataclass(frozen=True, slots=True)
class Label:
    """A question to the scorer: labels of this encoding for every loss row of the unit."""

    unit: Unit
    encoding: Labels
    given: RowIds | None = None  # where the encoding takes ids


@dataclass(frozen=True, slots=True)
class Prefill:
    """A question to vLLM as it comes: read these prompts, write one token; with its own prompt log-probabilities."""

    prompts: tuple[tuple[int, ...], ...]
    prompt_logprobs: int | None


@dataclass(frozen=True, slots=True)
class Cost:
    cpu: CpuTime
    wall_s: float
    num_bytes: int  # of the labels; 0 for what vLLM returns as Python objects


def prepare(plan: EnginePlan) -> Callable[[Label | Prefill], Cost]:
    """Load the engine of a plan: the scorer, or for role "generator" vLLM's own generation engine."""
    if plan.role == "scorer":
        scorer = Engine().start_scorer(plan, "bench-scorer")

        async def label(question: Label) -> int:
            unit, encoding, given = question.unit, question.encoding, question.given
            _, block = await scorer.score(unit, encoding, deadline_s=DEADLINE_S, given=given)
            return block.num_bytes

        return lambda question: _cost(lambda: label(question))
    loop = EngineLoop(lambda: build_engine(plan), name="bench-vllm")

    async def prefill(question: Prefill) -> int:
        tokens = sum(len(prompt) for prompt in question.prompts)
        await loop.submit(_requests(question), name="a batch", num_tokens=tokens, num_rows=0, deadline_s=DEADLINE_S)
        return 0

    return lambda question: _cost(lambda: prefill(question))


def _requests(question: Prefill) -> Sequence[Request]:
    from vllm import SamplingParams

    # With log-probabilities vLLM's default is to turn each candidate into text; without, nothing is asked for.
    asked = question.prompt_logprobs is not None
    return [
        Request(
            list(prompt),
            SamplingParams(max_tokens=1, temperature=0.0, detokenize=asked, prompt_logprobs=question.prompt_logprobs),
        )
        for prompt in question.prompts
    ]


def _cost(work: Callable[[], object]) -> Cost:
    before, started = of_this_process(), time.monotonic()
    num_bytes = asyncio.run(work())
    return Cost(of_this_process() - before, time.monotonic() - started, num_bytes)
