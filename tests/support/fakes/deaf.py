"""An engine that says it took in weights and did not: `engine: {kind: fakes.deaf}`."""

from __future__ import annotations

from cluster.engines.hf import Engine as HfEngine
from cluster.engines.hf import load_model
from cluster.engines.hf_generator import HfGenerator
from cluster.engines.plan import EnginePlan
from configs.engines import Engine as AnEngine
from trainer.types import WeightBucket


class Deaf(HfGenerator):
    async def take(self, bucket: WeightBucket, *, deadline_s: float) -> None:
        self._version = str(bucket.header.version)


class Engine(AnEngine):
    kind: str = "fakes.deaf"

    arguments = HfEngine.arguments
    start_scorer = HfEngine.start_scorer

    def start_generator(self, plan: EnginePlan, name: str) -> Deaf:
        return Deaf(plan, load_model(plan), name)
