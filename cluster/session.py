"""`runtime: ray`: every role of a run as Ray actors in their own placement groups, owned by this process.

Nothing is detached: when the controller dies, Ray ends all of it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from cluster import runtime
from cluster.logs import SharedFolder
from cluster.placement import PlacedGroup, PlacedGroups, actor_options, create_groups
from cluster.resolve import Resolved
from cluster.students import RankActor, StudentGroup, StudentJob
from cluster.teachers import ReplicaPool, TeacherActor
from trainer.loops import Observer
from trainer.run_folder import RunFolder
from trainer.types import BlockRef, SoftLabelBlock

RANK_THREADS = 3  # a step, the staging of the next, and a question from outside


class RaySession:
    """Implements `trainer.protocols.Session`. Ray is up; `reserve` comes first, `close` last."""

    def __init__(self, job: StudentJob, resolved: Resolved, *, folder: RunFolder, observer: Observer) -> None:
        self._job = job
        self._resolved = resolved
        self._folder = SharedFolder.of(folder.path)
        self._groups: PlacedGroups | None = None
        self.students = StudentGroup(job, spawn=self._spawn_rank, observer=observer)
        self.scorers = self._pool(resolved.scorer, job.run.teacher.scorer.replicas, observer)
        writer = job.run.teacher.writer
        self.writers = self._pool(resolved.writer, writer.replicas, observer) if writer else None

    async def reserve(self) -> None:
        """All placement groups at once, or an error that says what is missing."""
        timeout_s = self._job.run.faults.start_timeout_s or 600.0
        self._groups = await asyncio.to_thread(create_groups, self._resolved.placement, timeout_s=timeout_s)

    async def start_teachers(self) -> None:
        await asyncio.gather(*(pool.start() for pool in (self.scorers, self.writers) if pool is not None))

    def read_block(self, ref: BlockRef) -> SoftLabelBlock:
        return ray.get(ref, timeout=self._job.run.faults.score_timeout_s)

    async def close(self) -> None:
        """Stop every role and give the reservations back; bounded."""
        pools = [pool.close() for pool in (self.scorers, self.writers) if pool is not None]
        await asyncio.gather(self.students.close(), *pools)
        if self._groups is not None:
            self._groups.release()

    def _pool(self, plan: Any, num_replicas: int, observer: Observer) -> ReplicaPool:
        def spawn(index: int, name: str) -> Any:
            options = actor_options(self._placed(plan.role)[index], environment=plan.environment)
            return ray.remote(TeacherActor).options(**options).remote(plan, name, self._folder)

        return ReplicaPool(plan, num_replicas=num_replicas, spawn=spawn, faults=self._job.run.faults, observer=observer)

    def _spawn_rank(self, index: int, name: str) -> Any:
        (placed,) = self._placed(runtime.STUDENT)
        options = actor_options(placed, environment=self._resolved.student_environment, bundle=index)
        actor = ray.remote(RankActor).options(**options, max_concurrency=RANK_THREADS)
        return actor.remote(name, self._folder)

    def _placed(self, role: runtime.Role) -> tuple[PlacedGroup, ...]:
        assert self._groups is not None, "reserve() comes first"
        return self._groups.of_role(role)
