"""A rollout engine without a model: `engine: {kind: fakes.rollouts}`. Its one weight is a number, which is what it says
of every token."""

from __future__ import annotations

import numpy as np

from cluster.engines.plan import EnginePlan
from configs.engines import Engine as AnEngine
from trainer.types import Completion, GenerationRequest, WeightBucket


class Writer:
    def __init__(self) -> None:
        self.coming: list[float] = []
        self.weight, self.version = 0.0, "0"

    async def take(self, bucket: WeightBucket, *, deadline_s: float) -> None:
        self.coming = [*(self.coming if bucket.header.index else []), float(bucket.weights["w"][0])]
        if bucket.header.is_last:
            assert len(self.coming) == bucket.header.count
            self.weight, self.version = sum(self.coming), str(bucket.header.version)

    async def logprobs(self, token_ids: np.ndarray, *, deadline_s: float) -> np.ndarray:
        return np.full(len(token_ids) - 1, -self.weight, dtype=np.float32)

    async def generate(self, requests: list[GenerationRequest], *, deadline_s: float) -> list[Completion]:
        made = np.asarray([7], np.int32), np.asarray([-self.weight], np.float32)
        return [Completion(*made, "stop", "student", ((0, self.version),)) for _ in requests]

    def close(self) -> None: ...


class Engine(AnEngine):
    kind: str = "fakes.rollouts"

    def arguments(self, **told: object) -> dict[str, object]:
        return {}

    def start_scorer(self, plan: EnginePlan, name: str) -> None: ...

    def start_generator(self, plan: EnginePlan, name: str) -> Writer:
        return Writer()
