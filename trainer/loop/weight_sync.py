"""The hook that brings the student's weights to the engines that write with them, and proves that they came.

engines have nothing left to write by older weights (policy.py)
ranks: gather a bucket -> rank 0 -> every engine takes it in, while the next one is gathered
a fixed text is scored by the student and by every engine: a gap over what dtypes explain ends the run
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.loop.policy import Policy
from trainer.loop.settings import every
from trainer.protocols import Hook, Observer, Rollouts, Students
from trainer.types import Probe, Trained

if TYPE_CHECKING:
    from trainer.loop.job import Job

PROBE_TOKENS = 96
PROBE_TEXT = (
    "A still turns a large wash into a small, clear spirit. The first run strips the water from the alcohol; the "
    "second one is slower, and its hands are careful: heads are set aside, the heart is kept, and the tails go back to "
    "the next batch. What is lost on the way is mostly volume: 1,000 litres become 80. The question is which notes of "
    "the grain survive, and a good distiller tastes before she decides. def area(r): return 3.14159 * r ** 2"
)
"""Prose, numbers and code, so that no model finds all of it improbable: rounding grows with the size of a logit."""

MAX_GAP = {"float32": 0.005, "bfloat16": 0.3}
"""Nats, by the coarser of both dtypes. In bfloat16 0.06 to 0.11 were measured, of SmolLM2-135M with 20 of its 30 layers
before and while it learns (docs/on-policy.md)."""


@dataclass(frozen=True, slots=True)
class SyncSettings:
    """What a run says of its transfers."""

    sync_every: int
    probe_ids: np.ndarray  # int32 [L]
    max_gap: float


def sync_settings(job: Job, *dtypes: str) -> SyncSettings:
    """Of a run whose student and rollout engines compute in `dtypes`."""
    rollouts = job.run.rollouts
    assert rollouts is not None
    ids = job.inputs.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    ids = ids[: min(PROBE_TOKENS, job.run.data.max_length - 1)]
    gap = rollouts.max_probe_gap or max(MAX_GAP[dtype] for dtype in dtypes)
    return SyncSettings(rollouts.sync_every, np.asarray(ids, dtype=np.int32), gap)


class WeightSync(Hook):
    """After every so many steps, and before the first one."""

    def __init__(
        self, students: Students, rollouts: Rollouts, policy: Policy, observer: Observer, settings: SyncSettings
    ) -> None:
        self._students = students
        self._rollouts = rollouts
        self._policy = policy
        self._observer = observer
        self._settings = settings
        self._told: dict[str, float] = {}

    async def begin(self, step: int) -> None:
        """The engines have read the student's files: a run that goes on has other weights by now."""
        await self._sync(step)

    def due(self, step: int, *, last: bool, elapsed_s: float) -> bool:
        return not last and every(self._settings.sync_every, step)

    async def run(self, trained: Trained) -> None:
        waited_from = time.time()
        await self._policy.drained(trained.step)
        waited_s = time.time() - waited_from
        await self._sync(trained.step)
        self._told["sync/wait_s"] = waited_s

    def told(self) -> Mapping[str, float]:
        told, self._told = self._told, {}
        return told

    async def _sync(self, version: int) -> None:
        started = time.time()
        num_bytes = await self._send(version)
        sent = time.time()
        logprobs = await self._students.probe(self._settings.probe_ids)
        gap = await self._rollouts.prove(Probe(version, self._settings.probe_ids, logprobs, self._settings.max_gap))
        stopped = time.time()
        self._observer.span("student", "sync", started, stopped, f"version {version}")
        self._told = {
            "sync/bytes": float(num_bytes),
            "sync/seconds": stopped - started,
            "sync/probe_s": stopped - sent,
            "sync/probe_gap": gap,
        }
        self._policy.synced(version)

    async def _send(self, version: int) -> int:
        """Bytes of all buckets. One is taken in while the next one is gathered."""
        taking: asyncio.Task[None] | None = None
        num_bytes, index, count = 0, 0, 1
        try:
            while index < count:
                header, bucket = await self._students.weights(version, index, self._rollouts.form)
                if taking is not None:
                    await taking
                taking = asyncio.create_task(self._rollouts.take(header, bucket), name=f"weights {version}/{index}")
                num_bytes, index, count = num_bytes + header.num_bytes, index + 1, header.count
            await taking
        finally:
            if taking is not None:
                taking.cancel()
        return num_bytes
