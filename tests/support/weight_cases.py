"""New weights for engines: buckets of a tiny student, what engines make of them, and what transformers says."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from vllm_process import DEADLINE_S, engine_plan, tiny_engine

from configs.models import EVERYTHING, ModelSource, Trained
from trainer.model.load import StudentModule, load_student
from trainer.model.weight_buckets import WeightBuckets
from trainer.types import GenerationRequest, Sampling, WeightBucket, WeightForm

TEXT = np.random.default_rng(3).integers(3, 280, 60).astype(np.int32)
FORM = WeightForm("float32", bucket_bytes=40_000, stored_names=True)


def student(folder: Path, *, trained: Trained = EVERYTHING) -> StudentModule:
    torch.manual_seed(0)
    return load_student(
        ModelSource(path=str(folder)),
        dtype=torch.float32,
        attention="sdpa",
        vocabulary_size=280,
        trained=trained,
        sharded=nullcontext(),
    )


def buckets_of(module: StudentModule, version: int, form: WeightForm = FORM) -> list[WeightBucket]:
    cut, made = WeightBuckets(module, form), []
    index, count = 0, 1
    while index < count:
        header, bucket = cut.bucket(version, index, keep=True)
        assert bucket is not None
        made.append(bucket)
        index, count = index + 1, header.count
    return made


def changed(bucket: WeightBucket, name: str, value: np.ndarray | None) -> WeightBucket:
    """A bucket with another array in the place of one of its weights; None: without that weight."""
    weights = {key: array for key, array in bucket.weights.items() if key != name or value is not None}
    return dataclasses.replace(bucket, weights=weights if value is None else {**weights, name: value})


@torch.inference_mode()
def truth(model: torch.nn.Module | Path, token_ids: np.ndarray = TEXT) -> np.ndarray:
    """float32 [L - 1]: log-probabilities of the tokens after the first, by transformers."""
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.from_numpy(token_ids.astype(np.int64))[None]
    logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()


def take_and_score(folder: Path, updates: Sequence[Sequence[WeightBucket]], **plan: Any) -> list[Any]:
    """In a process for vLLM: what an engine says of `TEXT` before and after each update, what it writes, and the
    error of an update that it refuses."""
    engine = tiny_engine()
    generator = engine.start_generator(engine_plan(engine, folder, role="generator", **plan), "rollout-0")
    greedy = GenerationRequest("0:0", TEXT[:20], Sampling(max_tokens=8))

    async def look() -> tuple[np.ndarray, np.ndarray, str]:
        scored = await generator.logprobs(TEXT, deadline_s=DEADLINE_S)
        (written,) = await generator.generate([greedy], deadline_s=DEADLINE_S)
        return scored, written.token_ids, written.versions[0][1]

    async def every_update() -> list[Any]:
        seen: list[Any] = [await look()]
        for update in updates:
            try:
                for bucket in update:
                    await generator.take(bucket, deadline_s=DEADLINE_S)
            except Exception as error:  # noqa: BLE001 - what it is, the test says
                seen.append(f"{type(error).__name__}: {error}")
            else:
                seen.append(await look())
        return seen

    try:
        return asyncio.run(every_update())
    finally:
        generator.close()
