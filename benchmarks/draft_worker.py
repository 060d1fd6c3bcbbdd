"""One vLLM engine as a worker of `benchmarks draft`: the teacher alone, or with a student that drafts for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu_time import CpuTime, of_this_process

KV_CACHE_BYTES = 256 * 2**20
_COUNTS = "vllm:spec_decode_num_"


@dataclass(frozen=True, slots=True)
class DraftSetup:
    teacher: Path
    student: Path | None  # None: the teacher alone
    num_draft_tokens: int
    max_length: int  # of prompt and answer
    on_cpu: bool


@dataclass(frozen=True, slots=True)
class Prompts:
    """A question: answer these, greedily, one after the other."""

    token_ids: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drafted:
    """What was written, and vLLM's own counts of speculation."""

    answers: tuple[tuple[int, ...], ...]
    cpu: CpuTime
    wall_s: float
    calls: int = 0  # of the teacher to judge a draft
    drafted: int = 0  # tokens
    accepted: int = 0
    accepted_at: tuple[int, ...] = field(default=())  # at each place of a draft: all before it were accepted too


def prepare(setup: DraftSetup) -> Callable[[Prompts], Drafted]:
    """Load the engine."""
    from vllm import LLM

    options: dict[str, Any] = {"dtype": "auto"}
    if setup.on_cpu:
        options = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": KV_CACHE_BYTES}
    if setup.student is not None:
        options["speculative_config"] = {
            "method": "draft_model",
            "model": str(setup.student),
            "num_speculative_tokens": setup.num_draft_tokens,
        }
    engine = LLM(
        str(setup.teacher),
        max_model_len=setup.max_length,
        max_num_seqs=1,  # as one person asks: what speculation is for
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        generation_config="vllm",
        disable_log_stats=False,  # the counts are among the statistics
        use_tqdm_on_load=False,
        seed=0,
        **options,
    )
    return lambda question: _answer(engine, question)


def _answer(engine: Any, question: Prompts) -> Drafted:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=question.max_new_tokens,
        stop_token_ids=list(question.stop_ids),
        detokenize=False,
    )
    before, cpu, began = _counts(engine), of_this_process(), time.monotonic()
    prompts = [{"prompt_token_ids": list(ids)} for ids in question.token_ids]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    after = _counts(engine)
    at = [now - then for now, then in zip(after["at"], before["at"], strict=True)] if before["at"] else after["at"]
    return Drafted(
        answers=tuple(tuple(output.outputs[0].token_ids) for output in outputs),
        cpu=of_this_process() - cpu,
        wall_s=time.monotonic() - began,
        calls=after["drafts"] - before["drafts"],
        drafted=after["draft_tokens"] - before["draft_tokens"],
        accepted=after["accepted_tokens"] - before["accepted_tokens"],
        accepted_at=tuple(at),
    )


def _counts(engine: Any) -> dict[str, Any]:
    """Zero for an engine that does not speculate."""
    found: dict[str, Any] = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "at": []}
    for metric in engine.get_metrics():
        name = metric.name.removeprefix(_COUNTS)
        if name in found:
            found[name] = int(metric.value)
        if name == "accepted_tokens_per_pos":
            found["at"] = [int(value) for value in metric.values]
    return found
