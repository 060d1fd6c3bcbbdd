"""The replica pool on a real Ray: killed, hanging, broken and refusing teachers, and who gets which unit."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from fakes.engines import Engine as FakeEngine
from fakes.engines import Generator
from ray.exceptions import ObjectLostError

from cluster.engines.plan import EnginePlan
from cluster.lifecycle import ray_session
from cluster.lifecycle.logs import SharedFolder
from cluster.teachers.actor import TeacherActor
from cluster.teachers.pool import CREDITS, ReplicaPool, shares_of
from configs.engines import ENGINES
from configs.labels import Labels
from configs.schema import Faults
from trainer.errors import InfrastructureError, InsufficientResources, StudentsLost, TeachersLost, UnitRejected
from trainer.types import GenerationRequest, Sampling, Sequence, Unit

pytestmark = pytest.mark.stack

SUPPORT = Path(__file__).parents[2] / "support"
FAULTS = Faults(
    start_timeout_s=60,
    score_timeout_s=20,
    ping_interval_s=0.5,
    ping_timeout_s=2.0,
    max_teacher_restarts=2,
    max_unit_attempts=4,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Any:
    started = ray_session.start_ray(num_cpus=6, address="local", object_store_bytes=100 * 2**20)
    yield started
    ray_session.stop_ray(started)


class Events:
    """Collects what the pool reports."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self.lanes: Counter[str] = Counter()

    def step(self, metrics: Any) -> None: ...

    def evaluation(self, evaluation: Any) -> None: ...

    def event(self, name: str, **fields: Any) -> None:
        self.names[name] += 1

    def span(self, lane: str, kind: str, start_s: float, stop_s: float, label: str = "") -> None:
        if kind in ("score", "generate"):
            self.lanes[lane] += 1


def plan(start_timeout_s: float = 60.0, role: str = "scorer", **parameters: Any) -> EnginePlan:
    return EnginePlan(
        role=role,
        engine=ENGINES.validate({"kind": "fakes.engines", **parameters}),
        model="none",
        revision=None,
        trust_remote_code=False,
        dtype="float32",
        device_type="none",
        tensor_parallel_size=1,
        max_length=64,
        arguments={},
        environment={"PYTHONPATH": str(SUPPORT)},
        teacher="fake",
        weights_version="1",
        tokenizer_fingerprint="fake",
        vocabulary_size=100,
        start_timeout_s=start_timeout_s,
    )


async def at_once(index: int) -> None:
    """A replica whose node stays."""


def pool(
    folder: Path,
    events: Events,
    *,
    replicas: int,
    faults: Faults = FAULTS,
    until_placed: Callable[[int], Awaitable[None]] = at_once,
    **parameters: Any,
) -> ReplicaPool:
    made = plan(**parameters)
    shared = SharedFolder.of(folder)

    def spawn(index: int, name: str) -> Any:
        options = {"num_cpus": 1, "max_restarts": 0, "runtime_env": {"env_vars": dict(made.environment)}}
        return ray.remote(TeacherActor).options(**options).remote(made, name, shared)

    return ReplicaPool(
        made,
        num_replicas=replicas,
        spawn=spawn,
        until_placed=until_placed,
        faults=faults,
        folder=shared,
        observer=events,
    )


def unit(index: int, length: int = 8) -> Unit:
    mask = np.arange(length) < length - 1
    ids = np.arange(length, dtype=np.int32) + index
    return Unit(id=f"1/0:{index}", sequences=(Sequence(f"0:{index}", ids, mask, "dataset"),))


ENCODING = Labels(kind="fake")


def run(scenario: Any) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, 90))


async def score_all(scorers: ReplicaPool, count: int) -> list[Any]:
    answers = await asyncio.gather(*(scorers.score(unit(i), ENCODING) for i in range(count)))
    for i, (report, ref) in enumerate(answers):
        block = ray.get(ref, timeout=20)
        assert report.unit_id == unit(i).id
        assert block.columns["values"][:, 0].tolist() == list(range(i, i + 7))
    return answers


def test_units_are_shared_by_the_replicas_within_their_credits(cluster: Any, tmp_path: Path) -> None:
    async def scenario() -> Events:
        events = Events()
        scorers = pool(tmp_path, events, replicas=2, delay_s=0.05)
        await scorers.start()
        most = 0
        scoring = asyncio.ensure_future(score_all(scorers, 12))
        while not scoring.done():
            most = max(most, *(replica.units_in_flight for replica in scorers._replicas))
            await asyncio.sleep(0.005)
        await scoring
        await scorers.close()
        assert most == CREDITS
        return events

    events = run(scenario())
    assert sum(events.lanes.values()) == 12
    assert min(events.lanes.values()) >= 4
    assert events.names["teacher_restart"] == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_hanging_teacher_is_replaced_and_every_unit_is_answered_once(
    cluster: Any, tmp_path: Path, how: signal.Signals
) -> None:
    async def scenario() -> tuple[Events, int]:
        events = Events()
        scorers = pool(tmp_path, events, replicas=2, delay_s=0.3)
        await scorers.start()
        victim = scorers._replicas[0].process.pid
        scoring = asyncio.ensure_future(score_all(scorers, 16))
        await asyncio.sleep(0.4)
        os.kill(victim, how)
        await scoring
        while not all(replica.healthy for replica in scorers._replicas):
            await asyncio.sleep(0.1)
        await scorers.close()
        return events, victim

    events, victim = run(scenario())
    assert events.names["teacher_restart"] == 1
    assert events.names["redispatch"] >= 1
    assert sum(events.lanes.values()) == 16
    assert not psutil.pid_exists(victim)


def requests(num_prompts: int = 5, n: int = 3) -> list[GenerationRequest]:
    sampling = Sampling(6, temperature=1.0, seed=3)
    prompts = [(f"0:{i}", np.arange(4, dtype=np.int32) + i) for i in range(num_prompts)]
    return [GenerationRequest(name, ids, sampling, sample=sample) for name, ids in prompts for sample in range(n)]


def test_shares_of_replicas_are_about_equal_and_hold_whole_prompts() -> None:
    shares = shares_of(requests(), 2)
    assert [len(share) for share in shares] == [9, 6]
    assert sorted(index for share in shares for index in share) == list(range(15))
    owners = {}
    for number, share in enumerate(shares):
        for index in share:
            assert owners.setdefault(requests()[index].prompt_id, number) == number
    assert shares_of(requests(num_prompts=1), 4) == [[0, 1, 2]]
    assert shares_of([], 4) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_what_a_lost_generator_wrote_is_written_again_word_for_word(
    cluster: Any, tmp_path: Path, how: signal.Signals
) -> None:
    async def scenario() -> tuple[list[list[int]], Events]:
        events = Events()
        generators = pool(tmp_path, events, replicas=2, role="generator", delay_s=1.0)
        await generators.start()
        writing = asyncio.ensure_future(generators.generate(requests()))
        await asyncio.sleep(0.4)
        os.kill(generators._replicas[0].process.pid, how)
        completions = await writing
        assert await generators.generate([]) == []
        await generators.close()
        return [completion.token_ids.tolist() for completion in completions], events

    texts, events = run(scenario())
    alone = Generator(FakeEngine(kind="fakes.engines"), plan(role="generator"))
    assert texts == [one.token_ids.tolist() for one in asyncio.run(alone.generate(requests(), deadline_s=9))]
    assert len({tuple(text) for text in texts}) == 15
    assert events.names["redispatch"] == 1
    assert sum(events.lanes.values()) == 2, "each share was written once"


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_teacher_whose_engine_died_in_a_living_process_is_replaced(
    cluster: Any, tmp_path: Path, replicas: int
) -> None:
    """It answers pings, and is always the least busy one."""

    async def scenario() -> Events:
        events = Events()
        once = str(tmp_path / "once")
        scorers = pool(tmp_path, events, replicas=replicas, delay_s=0.1, breaks="dies", once=once)
        await scorers.start()
        await score_all(scorers, 8)
        while not all(replica.healthy for replica in scorers._replicas):
            await asyncio.sleep(0.1)
        await scorers.close()
        return events

    events = run(scenario())
    assert events.names["teacher_restart"] == 1
    assert events.names["teacher_lost"] == 0
    assert sum(events.lanes.values()) == 8


def test_a_teacher_whose_engine_hangs_in_a_living_process_is_replaced(cluster: Any, tmp_path: Path) -> None:
    async def scenario() -> Events:
        events = Events()
        faults = FAULTS.model_copy(update={"score_timeout_s": 1.0})
        once = str(tmp_path / "once")
        scorers = pool(tmp_path, events, replicas=1, faults=faults, breaks="hangs", once=once)
        await scorers.start()
        await score_all(scorers, 4)
        await scorers.close()
        return events

    events = run(scenario())
    assert events.names["teacher_restart"] == 1
    assert sum(events.lanes.values()) == 4


def test_a_replica_whose_watcher_breaks_is_given_up_and_nobody_waits_for_it(cluster: Any, tmp_path: Path) -> None:
    class Full(Events):
        def event(self, name: str, **fields: Any) -> None:
            super().event(name, **fields)
            if name == "teacher_restart":
                raise OSError(28, "No space left on device")

    async def scenario() -> None:
        scorers = pool(tmp_path, Full(), replicas=1)
        await scorers.start()
        os.kill(scorers._replicas[0].process.pid, signal.SIGKILL)
        try:
            await score_all(scorers, 1)
        finally:
            await scorers.close()

    with pytest.raises(TeachersLost, match="No space left"):
        run(scenario())


def test_an_engine_that_cannot_start_is_the_error_of_the_run(cluster: Any, tmp_path: Path) -> None:
    async def scenario() -> None:
        scorers = pool(tmp_path, Events(), replicas=1, broken="weights of layer 3 are missing")
        try:
            await scorers.start()
        finally:
            await scorers.close()

    with pytest.raises(InfrastructureError, match="weights of layer 3 are missing"):
        run(scenario())


def test_an_engine_that_never_becomes_ready_ends_the_run_with_what_it_last_said(cluster: Any, tmp_path: Path) -> None:
    said = "loading shard 3\nERROR torch.OutOfMemoryError: tried to allocate 20 GiB\nretrying"

    async def scenario() -> None:
        scorers = pool(tmp_path, Events(), replicas=1, start_timeout_s=15.0, stuck=said)
        try:
            await scorers.start()
        finally:
            await scorers.close()

    with pytest.raises(InfrastructureError) as caught:
        run(scenario())
    first, *others = str(caught.value).splitlines()
    assert first == "scorer-0 of teacher fake did not start: torch.OutOfMemoryError: tried to allocate 20 GiB"
    assert "no answer after 15 s" in others[0]
    assert [line.strip() for line in others[-3:]] == said.splitlines()


def test_a_replica_that_cannot_be_placed_is_given_up_and_the_others_go_on(cluster: Any, tmp_path: Path) -> None:
    async def until_placed(index: int) -> None:
        if started and index == 0:
            raise InsufficientResources("insufficient resources for scorer-0 after 60 s")

    started: list[bool] = []

    async def scenario() -> Events:
        events = Events()
        scorers = pool(tmp_path, events, replicas=2, until_placed=until_placed, delay_s=0.1)
        await scorers.start()
        started.append(True)
        os.kill(scorers._replicas[0].process.pid, signal.SIGKILL)
        await score_all(scorers, 8)
        while not scorers._replicas[0].lost:
            await asyncio.sleep(0.1)
        await score_all(scorers, 4)
        await scorers.close()
        return events

    assert run(scenario()).names["teacher_lost"] == 1


def test_a_refused_unit_is_no_reason_to_restart_a_teacher(cluster: Any, tmp_path: Path) -> None:
    async def scenario() -> Events:
        events = Events()
        scorers = pool(tmp_path, events, replicas=2, refuse_id=40)
        await scorers.start()
        with pytest.raises(UnitRejected, match="holds token 40"):
            await scorers.score(unit(38), ENCODING)
        await score_all(scorers, 3)
        await scorers.close()
        return events

    events = run(scenario())
    assert events.names["teacher_restart"] == 0
    assert events.names["redispatch"] == 2  # a second opinion, then it is the data


def test_labels_about_other_tokens_never_leave_the_pool(cluster: Any, tmp_path: Path) -> None:
    async def scenario() -> None:
        scorers = pool(tmp_path, Events(), replicas=1, garbage=True)
        await scorers.start()
        try:
            await scorers.score(unit(1), ENCODING)
        finally:
            await scorers.close()

    with pytest.raises(UnitRejected, match="other tokens"):
        run(scenario())


def test_a_teacher_that_keeps_dying_is_given_up_with_its_last_error(cluster: Any, tmp_path: Path) -> None:
    async def scenario() -> None:
        scorers = pool(tmp_path, Events(), replicas=1, faults=FAULTS.model_copy(update={"max_teacher_restarts": 0}))
        await scorers.start()
        os.kill(scorers._replicas[0].process.pid, signal.SIGKILL)
        try:
            await scorers.score(unit(1), ENCODING)
        finally:
            await scorers.close()

    with pytest.raises(TeachersLost, match="no scorer of teacher fake is left"):
        run(scenario())


class LosesItsArguments:
    """An actor whose node cannot get what a call is given: Ray's answer, without a second node to lose."""

    @property
    def score(self) -> LosesItsArguments:
        return self

    def options(self, **options: Any) -> LosesItsArguments:
        return self

    def remote(self, *arguments: Any) -> tuple[LosesItsArguments, None]:
        return self, None

    def future(self) -> concurrent.futures.Future[Any]:
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        answer.set_exception(ObjectLostError("00" * 28, None, "chosen ids"))
        return answer


def test_ids_that_are_lost_with_the_node_of_their_rank_mean_that_the_students_are_lost(tmp_path: Path) -> None:
    async def scenario() -> Events:
        events = Events()
        scorers = pool(tmp_path, events, replicas=1)
        scorers._replicas[0].actor, scorers._replicas[0].healthy = LosesItsArguments(), True
        with pytest.raises(StudentsLost, match="chose for unit 1/0:1 are lost"):
            await scorers.score(unit(1), ENCODING, object())
        assert scorers._replicas[0].units_in_flight == 0
        return events

    assert run(scenario()).names.total() == 0
