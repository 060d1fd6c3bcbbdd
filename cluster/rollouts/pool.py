"""The pool of rollout engines: a pool of generators that also takes in weights.

    take(bucket) -> every replica, in order           a replica that fails meanwhile is left to its watcher
    a replica that starts again -> waits for a version to be whole -> takes in its buckets -> proves itself -> writes

The buckets of the version that engines have stay where they were put, in Ray's object store, until the next one comes:
an engine that dies comes back with the weights that its peers write with, whatever the student has learnt meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from ray.exceptions import RayError

from cluster.lifecycle.calls import answer, unwrap
from cluster.rollouts.form import form_of
from cluster.rollouts.proof import Proof
from cluster.teachers.pool import ANSWER_GRACE_S, Replica, ReplicaPool
from configs.models import Rollouts
from trainer.errors import EngineDead, StillhouseError
from trainer.types import BucketHeader, BucketRef, Probe


class RolloutPool(ReplicaPool):
    """Implements `trainer.protocols.Rollouts`."""

    def __init__(self, plan: Any, *, rollouts: Rollouts, **arguments: Any) -> None:
        """`arguments`: as of `ReplicaPool`."""
        super().__init__(plan, **arguments)
        self.form = form_of(plan, rollouts)
        self._buckets: list[BucketRef] = []  # of the version that engines have, or take in
        self._probe: Probe | None = None  # of that version
        self._proofs: dict[str, Proof] = {}  # by replica
        self._ready: set[str] = set()  # replicas that have all buckets that came so far
        self._whole = asyncio.Event()  # all buckets of a version are here
        self._whole.set()

    async def take(self, header: BucketHeader, bucket: BucketRef) -> None:
        """See the protocol. An engine that starts meanwhile takes in all of them when the last one is here."""
        if header.index == 0:
            self._buckets, self._probe = [], None
            self._whole.clear()
        self._buckets.append(bucket)
        await asyncio.gather(*(self._send(one, bucket) for one in self._replicas if one.name in self._ready))
        if header.is_last:
            self._whole.set()

    async def prove(self, probe: Probe) -> float:
        """See the protocol."""
        self._probe = probe
        gaps = await asyncio.gather(*(self._prove(one, probe) for one in self._replicas if one.name in self._ready))
        return max((gap for gap in gaps if gap is not None), default=0.0)

    async def _send(self, replica: Replica, bucket: BucketRef) -> None:
        actor = replica.actor
        try:
            await self._take(actor, bucket)
        except (RayError, StillhouseError) as error:
            self._ready.discard(replica.name)
            await self._suspect(replica, actor, EngineDead(f"took in no weights: {unwrap(error)}"))

    async def _take(self, actor: Any, bucket: BucketRef) -> None:
        if actor is None:
            raise EngineDead("it is being started again")
        deadline_s = self._faults.step_timeout_s
        await answer(actor.take.remote(bucket, deadline_s), deadline_s + ANSWER_GRACE_S)

    async def _prove(self, replica: Replica, probe: Probe) -> float | None:
        actor = replica.actor
        try:
            found = await self._logprobs(actor, probe)
        except (RayError, StillhouseError) as error:
            self._ready.discard(replica.name)
            await self._suspect(replica, actor, EngineDead(f"scored no probe: {unwrap(error)}"))
            return None
        return self._proof(replica).gap(probe, found)

    async def _logprobs(self, actor: Any, probe: Probe) -> np.ndarray:
        if actor is None:
            raise EngineDead("it is being started again")
        deadline_s = self._faults.score_timeout_s
        return await answer(actor.logprobs.remote(probe.token_ids, deadline_s), deadline_s + ANSWER_GRACE_S)

    def _proof(self, replica: Replica) -> Proof:
        return self._proofs.setdefault(replica.name, Proof(replica.name))

    async def _kill(self, replica: Replica) -> None:
        self._ready.discard(replica.name)
        await super()._kill(replica)

    async def _prepare(self, replica: Replica) -> None:
        """A replica that starts again has the weights of the student's files."""
        while True:
            await self._whole.wait()
            buckets, probe = self._buckets, self._probe
            for bucket in buckets:
                await self._take(replica.actor, bucket)
            found = None if probe is None else await self._logprobs(replica.actor, probe)
            if buckets is self._buckets and self._whole.is_set():
                break  # no newer weights came meanwhile
        if probe is not None and found is not None:
            self._proof(replica).gap(probe, found)
        self._ready.add(replica.name)  # nothing is awaited since: the next bucket comes here too
