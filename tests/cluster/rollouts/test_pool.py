"""Engines that take in weights, in real Ray actors: whatever dies, all that write have the same version."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.engines.plan import EnginePlan
from cluster.lifecycle import ray_session
from cluster.lifecycle.logs import SharedFolder
from cluster.rollouts.pool import RolloutPool
from cluster.teachers.actor import TeacherActor
from configs.engines import ENGINES
from configs.models import Rollouts
from configs.schema import Faults
from trainer.errors import SyncError
from trainer.types import BucketHeader, GenerationRequest, Probe, Sampling, WeightBucket

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

SUPPORT = Path(__file__).parents[2] / "support"
FAULTS = Faults(start_timeout_s=60, score_timeout_s=20, step_timeout_s=20, ping_interval_s=0.5, ping_timeout_s=5.0)
IDS = np.arange(5, dtype=np.int32)


class Events:
    def __init__(self) -> None:
        self.names: Counter[str] = Counter()

    def event(self, name: str, **fields: Any) -> None:
        self.names[name] += 1

    def span(self, *told: Any) -> None: ...


@pytest.fixture
def pool(tmp_path: Path) -> Any:
    started = ray_session.start_ray(num_cpus=4, address="local", object_store_bytes=100 * 2**20)
    plan = EnginePlan(
        role="rollout",
        engine=ENGINES.validate({"kind": "fakes.rollouts"}),
        model="none",
        revision=None,
        trust_remote_code=False,
        dtype="float32",
        device_type="none",
        tensor_parallel_size=1,
        max_length=64,
        arguments={},
        environment={"PYTHONPATH": str(SUPPORT)},
        teacher="student",
        weights_version="0",
        tokenizer_fingerprint="fake",
        vocabulary_size=100,
    )
    folder = SharedFolder.of(tmp_path)

    def spawn(index: int, name: str) -> Any:
        options = {"num_cpus": 1, "max_restarts": 0, "runtime_env": {"env_vars": dict(plan.environment)}}
        return ray.remote(TeacherActor).options(**options).remote(plan, name, folder)

    async def placed(index: int) -> None: ...

    events = Events()
    made = RolloutPool(
        plan,
        rollouts=Rollouts(replicas=2),
        num_replicas=2,
        spawn=spawn,
        until_placed=placed,
        faults=FAULTS,
        folder=folder,
        observer=events,
    )
    yield made, events
    ray_session.stop_ray(started)


async def transfer(pool: RolloutPool, version: int, *weights: float) -> float:
    for index, weight in enumerate(weights):
        header = BucketHeader(version, index, len(weights), 4)
        await pool.take(header, ray.put(WeightBucket(header, "float32", {"w": np.asarray([weight], np.float32)})))
    return await pool.prove(Probe(version, IDS, np.full(4, -sum(weights), np.float32), max_gap=0.01))


async def versions(pool: RolloutPool) -> list[str]:
    requests = [GenerationRequest(f"0:{i}", IDS, Sampling(1)) for i in range(4)]
    return [one.versions[0][1] for one in await pool.generate(requests)]


def test_every_engine_that_writes_has_the_version_that_came_last(pool: Any) -> None:
    engines, events = pool

    async def scenario() -> None:
        await engines.start()
        assert await transfer(engines, 1, 0.5, 0.25) == 0.0
        assert await versions(engines) == ["1"] * 4
        os.kill(engines._replicas[0].process.pid, signal.SIGKILL)
        while not events.names["teacher_restart"]:
            await asyncio.sleep(0.05)
        while len(engines._ready) < 2 or not engines._replicas[0].healthy:
            await asyncio.sleep(0.05)
        assert await versions(engines) == ["1"] * 4, "it came back with the weights of its peers"
        async with engines._changed:
            engines._replicas[1].healthy = False  # suspected, and asked to show that it lives
        assert await transfer(engines, 2, 0.5, 0.75, 1.0) == 0.0
        await engines._set_healthy(engines._replicas[1])
        assert await versions(engines) == ["2"] * 4, "one that was suspected took the weights in all the same"
        with pytest.raises(SyncError, match="after step 3"):
            await engines.prove(Probe(3, IDS, np.full(4, -9.0, np.float32), max_gap=0.01))
        await engines.close()

    asyncio.run(asyncio.wait_for(scenario(), 120))
