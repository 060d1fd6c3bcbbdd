"""`runtime: ray`: every role of a run as Ray actors in their own placement groups, owned by this process.

Nothing is detached: when the controller dies, Ray ends all of it. Every group and every actor is named after the run
and a few random letters, so that runs that share a cluster do not meet and its lists can be read.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from cluster import runtime
from cluster.engines.plan import EnginePlan
from cluster.lifecycle.drain import watch_for_drain
from cluster.lifecycle.health import PlacedProcess
from cluster.lifecycle.logs import SharedFolder
from cluster.placement.plans import TeacherPlans
from cluster.placement.reserve import (
    PlacedGroup,
    PlacedGroups,
    actor_options,
    create_groups,
    nodes_of,
    wait_until_placed,
)
from cluster.placement.resolve import Resolved
from cluster.preflight.machine import Needs
from cluster.preflight.nodes import check_nodes
from cluster.rollouts.pool import RolloutPool
from cluster.students.group import RankActor, StudentGroup, StudentJob
from cluster.teachers.actor import TeacherActor
from cluster.teachers.pool import ReplicaPool
from configs.engines import Vllm
from trainer.build import VARIABLE, build_hash
from trainer.errors import InfrastructureError
from trainer.protocols import Observer, TeacherPools
from trainer.run_folder import RunFolder
from trainer.types import BlockRef, SoftLabelBlock

RANK_THREADS = 3  # a step, the staging of the next, and a question from outside
CLOSE_TIMEOUT_S = 90.0  # more than the bounds of every role's own close together


class RaySession:
    """Implements `trainer.protocols.Session`. Ray is up; `reserve` comes first, `close` last."""

    in_one_process = False

    def __init__(
        self, job: StudentJob, resolved: Resolved, *, folder: RunFolder, observer: Observer, shared: bool = False
    ) -> None:
        """`shared`: the cluster was there before the run, so its processes must prove that they run the same code."""
        self.run_id = f"{job.run.name}-{secrets.token_hex(3)}"
        self._job = job
        self._resolved = resolved
        self._observer = observer
        self._shared = shared
        self._folder = SharedFolder.of(folder.path)
        self._groups: PlacedGroups | None = None
        self._starts: Counter[str] = Counter()
        self._checked: set[str] = set()  # ids of nodes
        self.students = StudentGroup(
            job,
            spawn=self._spawn_rank,
            until_placed=self._until_students_placed,
            folder=self._folder,
            observer=observer,
        )
        self._pools: dict[str, ReplicaPool] = {}
        self.teachers = {name: TeacherPools(*self._pools_of(plans)) for name, plans in resolved.teachers.items()}
        self.rollouts = self._rollouts(resolved.rollouts)

    async def reserve(self) -> None:
        """All placement groups at once, or an error that says what is missing."""
        self._observer.phase("reserving slots for the roles")
        self._groups = await create_groups(
            self._resolved.placement,
            timeout_s=self._job.run.faults.room_timeout_s,
            run_id=self.run_id,
            note=self._note,
        )

    async def check_nodes(self) -> None:
        """See the protocol; only a cluster that was there before the run has nodes of other software."""
        if not self._shared:
            return
        assert self._groups is not None, "reserve() comes first"
        self._observer.phase("checking the nodes")
        await self._check(self._groups.nodes())

    async def _check(self, nodes: Mapping[str, Sequence[str]]) -> None:
        """`nodes`: id -> what is to run there. Each is asked once."""
        new = {node: roles for node, roles in nodes.items() if node not in self._checked}
        if not new:
            return
        run = self._job.run
        started = [run.teachers_by_name()[name].model for name in self._resolved.teachers]
        needs = Needs(
            vllm=any(isinstance(plan.engine, Vllm) for plan in self._resolved.engines),
            models=tuple((model.path, model.revision) for model in (*started, run.student.model)),
            shared=(str(self._folder.path), self._folder.mark),
        )
        await check_nodes(new, needs, note=self._note)
        self._checked |= new.keys()

    async def start_teachers(self) -> None:
        await asyncio.gather(*(pool.start() for pool in self._pools.values()))

    def read_block(self, ref: BlockRef) -> SoftLabelBlock:
        try:
            return ray.get(ref, timeout=self._job.run.faults.score_timeout_s)
        except RayError as error:
            raise InfrastructureError(f"labels could not be fetched from the node that made them: {error}") from None

    async def watch_for_drain(self, stop: Callable[[str], None]) -> None:
        """See the protocol and `cluster.lifecycle.drain`; a cluster that this run started is not taken away from it."""
        if not self._shared:
            return

        def roles_on(node: str) -> list[str]:
            return [process.role for process in self._processes() if process.node == node]

        await watch_for_drain(roles_on, ray.get_runtime_context().get_node_id(), stop=stop, note=self._note)

    async def close(self) -> None:
        """Stop every role and give the reservations back, which ends whatever did not stop; bounded."""
        closing = {"students": self.students.close()} | {name: pool.close() for name, pool in self._pools.items()}
        try:
            await close_all(closing, note=self._note)
        finally:
            if self._groups is not None:
                self._groups.release()

    def _pools_of(self, plans: TeacherPlans) -> tuple[ReplicaPool | None, ReplicaPool | None]:
        """Scorers and generators: the same where each process does both."""
        scorers = self._pool(plans.scorer)
        beside = plans.scorer is not None and plans.scorer.beside is not None
        return scorers, scorers if beside else self._pool(plans.generator)

    def _rollouts(self, plan: EnginePlan | None) -> RolloutPool | None:
        if plan is None:
            return None
        pool = self._new_pool(plan, partial(RolloutPool, rollouts=self._job.run.rollouts))
        assert isinstance(pool, RolloutPool)
        return pool

    def _pool(self, plan: EnginePlan | None) -> ReplicaPool | None:
        return None if plan is None else self._new_pool(plan, ReplicaPool)

    def _new_pool(self, plan: EnginePlan, make: Callable[..., ReplicaPool]) -> ReplicaPool:

        def spawn(index: int, name: str) -> ActorHandle:
            placed, bundle = self._actors(plan.actors)[index]
            options = actor_options(
                placed, environment=self._environment(plan.environment), bundle=bundle, name=self._new_name(name)
            )
            return ray.remote(TeacherActor).options(**options).remote(plan, name, self._folder)

        async def until_placed(index: int) -> None:
            await self._until_placed(self._actors(plan.actors)[index][0])

        pool = self._pools[f"{plan.actors}s"] = make(
            plan,
            num_replicas=len(self._resolved.placement.actors_of_role(plan.actors)),
            spawn=spawn,
            until_placed=until_placed,
            faults=self._job.run.faults,
            folder=self._folder,
            observer=self._observer,
        )
        return pool

    def _spawn_rank(self, index: int, name: str) -> ActorHandle:
        placed, bundle = self._actors(runtime.STUDENT)[index]
        environment = self._environment(self._resolved.student_environment)
        options = actor_options(placed, environment=environment, bundle=bundle, name=self._new_name(name))
        actor = ray.remote(RankActor).options(**options, max_concurrency=RANK_THREADS)
        return actor.remote(name, self._folder)

    async def _until_students_placed(self) -> None:
        await self._until_placed(self._actors(runtime.STUDENT)[0][0])

    async def _until_placed(self, placed: PlacedGroup) -> None:
        await wait_until_placed(placed, timeout_s=self._job.run.faults.room_timeout_s, note=self._note)
        if self._shared:  # a node that takes the place of a lost one is as new as the first ones were
            found = await asyncio.to_thread(nodes_of, placed)
            await self._check(dict.fromkeys(found, (placed.group.name,)))

    def _actors(self, role: str) -> tuple[tuple[PlacedGroup, int], ...]:
        assert self._groups is not None, "reserve() comes first"
        return self._groups.actors_of_role(role)

    def _environment(self, table: Mapping[str, str]) -> dict[str, str]:
        shared = {VARIABLE: build_hash()} if self._shared else {}
        return {**table, **runtime.handed_on(), **shared}

    def _new_name(self, name: str) -> str:
        """Of an actor: a process that is still dying keeps its name, so the next start of a role takes another."""
        self._starts[name] += 1
        again = f".{self._starts[name]}" if self._starts[name] > 1 else ""
        return f"{self.run_id}/{name}{again}"

    def _processes(self) -> list[PlacedProcess]:
        return [
            *self.students.placed_processes(),
            *(one for pool in self._pools.values() for one in pool.placed_processes()),
        ]

    def _note(self, text: str) -> None:
        self._observer.event("note", text=text)


async def close_all(
    closing: Mapping[str, Coroutine[Any, Any, None]],
    *,
    note: Callable[[str], None],
    timeout_s: float = CLOSE_TIMEOUT_S,
) -> None:
    """Run what closes each role at the same time, given by name. One that is not done at the deadline is noted and
    given up; an error of one is raised when all are done."""
    tasks = {asyncio.create_task(close): name for name, close in closing.items()}
    done, late = await asyncio.wait(tasks, timeout=timeout_s)
    for task in late:
        task.cancel()
    if late:
        names = ", ".join(sorted(tasks[task] for task in late))
        note(f"{names} did not stop within {timeout_s:.0f} s and are ended with their reservations")
    for task in done:
        task.result()
