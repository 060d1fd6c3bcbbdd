"""The replicas of a teacher: kept busy, watched and restarted.

    Loops.score(unit) -> ReplicaPool: lease (fewest tokens in flight, `CREDITS` units each) -> TeacherActor.score
                                 ^                                                             |
                                 +-- it died, hangs, or the deadline passed: another lease ----+-> (report, block ref)

Scoring is pure, so a unit may be executed twice, but only one answer is ever returned for it: the first commit wins.
Blocks are *returned* by the actor, so the controller owns them and they outlive the process that made them; the
controller itself reads only the report.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import ObjectLostError, RayError

from cluster.engines.plan import EnginePlan
from cluster.engines.refusals import start_failure
from cluster.lifecycle.calls import answer, brief, unwrap
from cluster.lifecycle.health import (
    Failure,
    FailureKind,
    FailurePolicy,
    PlacedProcess,
    ReplicaLoad,
    RestartReplica,
    RetryUnit,
    choose_replica,
)
from cluster.lifecycle.logs import SharedFolder, last_words
from cluster.lifecycle.processes import ProcessIdentity, kill_actor, wait_killed
from configs.labels import Labels
from configs.schema import Faults
from trainer.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineDead,
    InfrastructureError,
    InsufficientResources,
    LabelsLost,
    StillhouseError,
    StudentsLost,
    TeachersLost,
    UnitRejected,
)
from trainer.protocols import Observer
from trainer.types import BlockRef, Completion, GenerationRequest, RowIdsRef, Unit, UnitReport

MAX_MISSES = 3  # deadlines in a row without an answer: more than `CREDITS`, so that it is not one heavy unit
CREDITS = 2  # units in flight per engine: with 1 the engine idles between units, with more a lost replica costs more
CLOSE_TIMEOUT_S = 20.0
ANSWER_GRACE_S = 5.0  # the engine aborts at the deadline; its answer may take this much longer to arrive


@dataclass(slots=True, eq=False)
class Replica:
    """What the pool knows of one replica."""

    name: str
    actor: Any = None
    process: ProcessIdentity | None = None
    healthy: bool = False
    lost: bool = False
    failures: int = 0  # without progress in between, as the policy counts them
    progress: bool = False  # a unit was answered since the last failure
    restarts: int = 0  # in all
    units_in_flight: int = 0
    tokens_in_flight: int = 0
    misses: int = 0  # deadlines since its last answer
    broken: tuple[FailureKind, str] | None = None  # what is known already: no ping is asked for it
    suspected: asyncio.Event = field(default_factory=asyncio.Event)


class ReplicaPool:
    """All replicas of one role of a teacher. Implements `Scorers` or `Generators`, by its plan; both, where another
    engine lies beside."""

    def __init__(
        self,
        plan: EnginePlan,
        *,
        num_replicas: int,
        spawn: Callable[[int, str], Any],
        faults: Faults,
        observer: Observer,
        folder: SharedFolder,
        until_placed: Callable[[int], Awaitable[None]],
    ) -> None:
        """`spawn(index, name)` makes a fresh `TeacherActor` handle in the bundle of replica `index`;
        `until_placed(index)` returns when that lies on a living node, or raises `InsufficientResources`. `folder` holds
        the logs."""
        self._plan = plan
        self._folder = folder
        self._until_placed = until_placed
        self._spawn = spawn
        self._faults = faults
        self._observer = observer
        self._policy = FailurePolicy.of_teachers(faults)
        self._credits = CREDITS * (1 if plan.beside is None else 2)
        self._replicas = [Replica(name=f"{plan.actors}-{index}") for index in range(num_replicas)]
        self._changed = asyncio.Condition()
        self._watchers: list[asyncio.Task[None]] = []
        self._last_error = ""
        self._told: set[str] = set()

    async def start(self) -> None:
        """Start every replica; the first error of an engine is the error of the run, nothing is retried yet."""
        await asyncio.gather(*(self._start(index) for index in range(len(self._replicas))))
        self._watchers = [asyncio.create_task(self._watch(index)) for index in range(len(self._replicas))]

    async def score(
        self, unit: Unit, encoding: Labels, given: RowIdsRef | tuple[BlockRef, ...] | None = None
    ) -> tuple[UnitReport, BlockRef]:
        deadline_s = self._faults.score_timeout_s
        refs = given if isinstance(given, tuple) else (given,)

        async def send(actor: Any) -> tuple[UnitReport, BlockRef]:
            report_ref, block_ref = actor.score.options(num_returns=2).remote(unit, encoding, deadline_s, *refs)
            try:
                report = await answer(report_ref, deadline_s + ANSWER_GRACE_S)
            except RayError as error:
                if given is not None and isinstance(unwrap(error), ObjectLostError):
                    if isinstance(given, tuple):
                        raise LabelsLost([unit.id]) from None
                    text = f"the ids that the student chose for unit {unit.id} are lost with the node of its rank"
                    raise StudentsLost(text) from None
                raise
            check_report(report, unit)
            return report, block_ref

        report, block_ref = await self._lease(f"unit {unit.id}", unit.num_tokens, send)
        self._observer.span(report.replica, "score", report.started_s, report.started_s + report.score_s, unit.id)
        tell_notes(report.notes, self._told, self._observer)
        return report, block_ref

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Requests are dealt to the replicas in about equal shares, those of one prompt together: their engine reads it
        once. A share that fails is written by another replica, from the same seeds."""
        shares = shares_of(requests, len(self._replicas))
        written = await asyncio.gather(*(self._generate([requests[index] for index in share]) for share in shares))
        completions: dict[int, Completion] = {}
        for share, texts in zip(shares, written, strict=True):
            completions.update(zip(share, texts, strict=True))
        return [completions[index] for index in range(len(requests))]

    async def _generate(self, requests: list[GenerationRequest]) -> list[Completion]:
        deadline_s = self._faults.score_timeout_s
        started = time.time()
        where = ""

        async def send(actor: Any) -> list[Completion]:
            nonlocal where
            where = next(replica.name for replica in self._replicas if replica.actor is actor)
            return await answer(actor.generate.remote(requests, deadline_s), deadline_s + ANSWER_GRACE_S)

        what = f"{len(requests)} answers from that to {requests[0].id} on"
        completions = await self._lease(what, sum(len(request.token_ids) for request in requests), send)
        self._observer.span(where, "generate", started, time.time(), f"{len(requests)} answers")
        return completions

    async def _lease(self, what: str, tokens: int, send: Callable[[Any], Awaitable[Any]]) -> Any:
        """Run `send` on one replica after another until it answers or the policy gives up."""
        refused_by: set[str] = set()
        failed_on: set[str] = set()
        attempt = 0
        while True:
            replica = await self._acquire(tokens, refused_by, failed_on)
            actor = replica.actor
            try:
                result = await send(actor)
                replica.progress, replica.misses = True, 0
                return result
            except (LabelsLost, StudentsLost):
                raise
            except (RayError, StillhouseError) as error:
                attempt += 1
                cause = unwrap(error)
                refused = isinstance(cause, UnitRejected)
                if refused:
                    refused_by.add(replica.name)
                else:
                    failed_on.add(replica.name)
                    await self._suspect(replica, actor, cause)
                kind: FailureKind = "unit_refused" if refused else "unit_failed"
                decision = self._policy.decide(Failure(kind=kind, count=attempt))
                self._observer.event("redispatch", what=what, replica=replica.name, attempt=attempt, error=brief(cause))
                if not isinstance(decision, RetryUnit):
                    raise give_up(what, attempt, cause) from None
                delay_s = decision.delay_s
            finally:
                await self._release(replica, tokens)
            await asyncio.sleep(delay_s)

    async def _acquire(self, tokens: int, refused_by: set[str], failed_on: set[str]) -> Replica:
        """Wait for a credit of the best replica: not one of `refused_by` while another lives, not one of `failed_on`
        while another is healthy."""
        async with self._changed:
            while True:
                alive = [replica for replica in self._replicas if not replica.lost]
                if not alive:
                    raise TeachersLost(f"no {self._plan.role} of {self._plan.whose} is left: {self._last_error}")
                exclude = refused_by if any(replica.name not in refused_by for replica in alive) else set()
                others = exclude | failed_on
                if any(replica.healthy and replica.name not in others for replica in alive):
                    exclude = others
                name = choose_replica([load(replica) for replica in alive], credits=self._credits, exclude=exclude)
                if name is not None:
                    replica = next(replica for replica in alive if replica.name == name)
                    replica.units_in_flight += 1
                    replica.tokens_in_flight += tokens
                    return replica
                await self._changed.wait()

    async def _release(self, replica: Replica, tokens: int) -> None:
        async with self._changed:
            replica.units_in_flight -= 1
            replica.tokens_in_flight -= tokens
            self._changed.notify_all()

    async def _suspect(self, replica: Replica, actor: Any, cause: BaseException) -> None:
        """Send it nothing until its watcher has had a look. A broken engine, and one that hangs, sit in an actor that
        answers pings: these the watcher restarts without asking."""
        async with self._changed:
            if replica.actor is not actor:  # it was started anew meanwhile
                return
            replica.healthy = False
            if isinstance(cause, EngineDead):
                replica.broken = ("teacher_died", brief(cause))
            elif isinstance(cause, DeadlineExceeded):
                replica.misses += 1
                if replica.misses >= MAX_MISSES:
                    replica.broken = ("teacher_hung", f"{replica.misses} deadlines missed in a row: {brief(cause)}")
            replica.suspected.set()

    async def _watch(self, index: int) -> None:
        """One replica's health, independent of its requests: a hung process answers no ping, and nothing else tells."""
        replica = self._replicas[index]
        try:
            while not replica.lost:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._faults.ping_interval_s):
                        await replica.suspected.wait()
                replica.suspected.clear()
                failure = replica.broken or await self._ping(replica)
                if failure is None:
                    await self._set_healthy(replica)
                else:
                    await self._restart(index, *failure)
        except Exception as error:  # noqa: BLE001 - units must not wait for a replica that nobody looks after
            await self._lose(replica, f"its watcher failed: {brief(error)}")

    async def _ping(self, replica: Replica) -> tuple[FailureKind, str] | None:
        try:
            await answer(replica.actor.ping.remote(), self._faults.ping_timeout_s)
        except (RayError, DeadlineExceeded) as error:
            kind: FailureKind = "teacher_hung" if isinstance(error, DeadlineExceeded) else "teacher_died"
            return kind, brief(unwrap(error))
        return None

    async def _restart(self, index: int, kind: FailureKind, reason: str) -> None:
        """Kill and start again until it is ready or the policy gives up on it."""
        replica = self._replicas[index]
        async with self._changed:
            replica.healthy = False
        while True:
            failure = Failure(kind=kind, count=replica.failures + 1, progress_since_last=replica.progress)
            decision = self._policy.decide(failure)
            if not isinstance(decision, RestartReplica):
                await self._lose(replica, reason)
                return
            await self._kill(replica)
            replica.failures, replica.progress = decision.count, False
            replica.restarts += 1
            self._observer.event("teacher_restart", replica=replica.name, reason=reason, restarts=replica.restarts)
            await asyncio.sleep(decision.delay_s)
            try:
                await self._start(index)
                return
            except (InsufficientResources, ConfigError) as error:  # neither gets better by trying again
                await self._lose(replica, str(error))
                return
            except (RayError, StillhouseError) as error:
                kind, reason = "teacher_died", brief(unwrap(error))

    async def _kill(self, replica: Replica) -> None:
        actor, process = replica.actor, replica.process
        replica.actor = replica.process = None
        if actor is not None:
            await asyncio.to_thread(wait_killed, kill_actor(actor, process))

    async def _lose(self, replica: Replica, reason: str) -> None:
        async with self._changed:
            replica.healthy, replica.lost = False, True
            self._last_error = reason
            self._changed.notify_all()
        await self._kill(replica)
        self._observer.event("teacher_lost", replica=replica.name, reason=reason, restarts=replica.restarts)

    async def _set_healthy(self, replica: Replica) -> None:
        async with self._changed:
            if not replica.healthy and replica.broken is None:
                replica.healthy = True
                self._changed.notify_all()

    async def _start(self, index: int) -> None:
        replica = self._replicas[index]
        await self._until_placed(index)
        started = time.time()
        replica.actor, replica.process = self._spawn(index, replica.name), None
        replica.misses, replica.broken = 0, None
        try:
            process = await answer(replica.actor.identify.remote(), self._plan.start_timeout_s)
            replica.process = process
            self._observer.event("process", role=replica.name, pid=process.pid, node=process.node)
            segments = await answer(replica.actor.start.remote(), self._plan.start_timeout_s)
            replica.process = replace(process, shared_memory=segments)
            await self._prepare(replica)
        except (RayError, DeadlineExceeded) as error:
            cause = unwrap(error)
            if isinstance(cause, ConfigError):
                raise cause from None
            words = last_words(self._folder, replica.name)
            text = f"{replica.name} of {self._plan.whose} did not start: {words.after(brief(cause))}"
            if replica.restarts:  # it could start before
                raise InfrastructureError(text) from None
            raise start_failure(text, cause=cause, logged=words.error) from None
        self._observer.span(replica.name, "start", started, time.time())
        await self._set_healthy(replica)

    async def _prepare(self, replica: Replica) -> None:
        """What an engine that is up needs before it works; fails as its start does."""

    def placed_processes(self) -> list[PlacedProcess]:
        """Where the replicas are."""
        return [PlacedProcess(one.name, one.process.node) for one in self._replicas if one.process and not one.lost]

    async def close(self) -> None:
        """Stop the engines, then the processes; bounded, and silent about replicas that are already gone."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        alive = [replica for replica in self._replicas if replica.actor is not None]
        closing = [answer(replica.actor.close.remote(), CLOSE_TIMEOUT_S) for replica in alive]
        for notes in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(notes, tuple):  # else it is gone
                tell_notes(notes, self._told, self._observer)
        await asyncio.gather(*(self._kill(replica) for replica in alive))


def shares_of(requests: Sequence[GenerationRequest], num_replicas: int) -> list[list[int]]:
    """Positions of the requests of each share; none is empty."""
    prompts: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        prompts.setdefault(request.prompt_id, []).append(index)
    shares: list[list[int]] = [[] for _ in range(min(num_replicas, len(prompts)))]
    for number, indices in enumerate(prompts.values()):
        shares[number % len(shares)].extend(indices)
    return shares


def load(replica: Replica) -> ReplicaLoad:
    return ReplicaLoad(
        name=replica.name,
        tokens_in_flight=replica.tokens_in_flight,
        units_in_flight=replica.units_in_flight,
        healthy=replica.healthy,
    )


def check_report(report: UnitReport, unit: Unit) -> None:
    """The labels are about exactly these tokens and rows, and finite."""
    if report.tokens_hash != unit.tokens_hash() or report.num_rows != unit.num_rows:
        raise UnitRejected(
            f"unit {unit.id}: {report.replica} answered for other tokens: {report.num_rows} rows, {unit.num_rows} asked"
        )
    if report.num_non_finite:
        raise UnitRejected(f"unit {unit.id}: {report.num_non_finite} non-finite label values from {report.replica}")


def tell_notes(notes: Sequence[str], told: set[str], observer: Observer) -> None:
    """Each once, whichever replicas say it; `told` holds those that were."""
    for text in notes:
        if text not in told:
            told.add(text)
            observer.event("note", text=text)


def give_up(what: str, attempts: int, cause: BaseException) -> StillhouseError:
    if isinstance(cause, UnitRejected):
        return UnitRejected(f"{what}: every replica refuses: {cause}")
    return TeachersLost(f"{what} failed {attempts} times, the last time with {brief(cause)}")
