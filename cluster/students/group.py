"""The student group: one Ray actor per rank, driven by pushed calls, restarted only as a whole.

Ranks are disposable processes: a process group cannot be mended in a living process, so when one rank dies or hangs all
are killed, and the caller builds a new group from the last committed checkpoint. The rank's own code
(`trainer/model/student.py`) knows neither Ray nor this file.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from cluster import runtime
from cluster.lifecycle.calls import answer, unwrap
from cluster.lifecycle.health import PlacedProcess
from cluster.lifecycle.logs import SharedFolder, last_words, redirect_output
from cluster.lifecycle.processes import ProcessIdentity, kill_actor, this_process, wait_killed
from cluster.model_files import local_copy
from cluster.placement.topology import number_ranks
from cluster.runtime import RankPlace
from cluster.students.errors import group_error
from configs.schema import Run
from trainer.build import check_build
from trainer.errors import Defect, LabelsLost, StudentsLost
from trainer.imports import absent, uncollected
from trainer.loop.plan import units_taking_ids
from trainer.protocols import Observer, SelfTestResult, StudentInfo
from trainer.types import (
    BlockRef,
    BucketHeader,
    BucketRef,
    Evaluation,
    RankBatch,
    RowIds,
    RowIdsRef,
    SoftLabelBlock,
    StepMetrics,
    StudentPlan,
    Unit,
    WeightBucket,
    WeightForm,
)

if TYPE_CHECKING:
    from trainer.data.vocabulary import SharedVocabulary

FAILURE_GRACE_S = 3.0  # after the first rank failed: its peers' errors arrive, and the victim's names the cause


@dataclass(frozen=True, slots=True)
class StudentJob:
    """What every rank is built from."""

    run: Run
    plan: StudentPlan
    vocabulary: SharedVocabulary
    total_steps: int


class RankActor:
    """One rank: constructs a `StudentRank`, forwards calls. Calls run in threads, so each sets the device first."""

    def __init__(self, name: str, folder: SharedFolder) -> None:
        redirect_output(folder, name)
        self._folder = folder
        self._rank: Any = None
        self._device: Any = None

    def where(self) -> tuple[ProcessIdentity, tuple[str, ...], str]:
        """This process, the GPU ids that Ray handed to it, and its address. Imports what it will run, before the
        arguments of `build` would."""
        check_build()
        self._folder.check()
        # DeepSpeed's autotuner, which no run uses, imports all of mlflow: 80 MB and seconds.
        with absent("mlflow"), uncollected():
            import trainer.model.student  # noqa: F401
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return this_process(), tuple(str(gpu) for gpu in gpus), ray.util.get_node_ip_address()

    def free_port(self) -> int:
        return runtime.free_port()

    def build(self, job: StudentJob, place: RankPlace, world: int, address: str, port: int) -> StudentInfo:
        """Join the group and load the model; collective."""
        os.environ.update(runtime.student_environment(place, world=world, address=address, port=port))
        from trainer.model.student import StudentRank

        self._device = runtime.device_of(job.plan.device_type, place.local_rank)
        runtime.enter_device(self._device)
        self._rank = StudentRank(
            on_local_copy(job.run, timeout_s=job.plan.start_timeout_s),
            job.plan,
            rank=place.rank,
            world=world,
            device=self._device,
            vocabulary=job.vocabulary,
            total_steps=job.total_steps,
        )
        return self._rank.build()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Forward to the rank; the group's typed methods are the only callers."""
        runtime.enter_device(self._device)
        return getattr(self._rank, method)(*args, **kwargs)

    def stage(self, batch: RankBatch, *blocks: SoftLabelBlock) -> None:
        """Blocks are arguments of their own, so Ray brings each to this node before the call starts."""
        self.call("stage", batch, blocks)

    def propose(self, batch: RankBatch) -> tuple[RowIds | None, ...]:
        """None, which is all that the controller reads, and the ids of each unit, an object each."""
        return None, *self.call("propose", batch)

    def weights(self, version: int, index: int, form: WeightForm) -> tuple[BucketHeader, WeightBucket | None]:
        """The header, which is all that the controller reads, and the bucket, an object of its own."""
        return self.call("weights", version, index, form)

    def stage_evaluation(self, units: Sequence[Unit], *blocks: SoftLabelBlock | None) -> None:
        self.call("stage_evaluation", units, blocks)


def on_local_copy(run: Run, *, timeout_s: float) -> Run:
    """The run as the ranks of this node see it: the student's weights from the node's own copy where one is asked for.

    What they need of the teacher, its head, is little, and is read where the configuration says.
    """
    model = run.student.model
    if model.local_copy is None:
        return run
    copy = model.model_copy(update={"path": str(local_copy(model.path, model.local_copy, timeout_s=timeout_s))})
    return run.model_copy(update={"student": run.student.model_copy(update={"model": copy})})


class StudentGroup:
    """All ranks of the student. Implements `trainer.protocols.Students`."""

    def __init__(
        self,
        job: StudentJob,
        *,
        spawn: Callable[[int, str], Any],
        until_placed: Callable[[], Awaitable[None]],
        folder: SharedFolder,
        observer: Observer,
    ) -> None:
        """`spawn(index, name)` makes a fresh `RankActor` handle in the bundle of rank `index`; `until_placed()` returns
        when the group lies on living nodes, or raises `InsufficientResources`. `folder` holds the logs."""
        self._until_placed = until_placed
        self._folder = folder
        self._job = job
        self._spawn = spawn
        self._observer = observer
        self._faults = job.run.faults
        self._ranks: list[Any] = []
        self.processes: list[ProcessIdentity] = []  # of the ranks, by rank; empty until they are placed
        self._tasks = job.run.resolved_tasks()
        self.world = job.run.student.ranks

    async def start(self, checkpoint: Path | None) -> StudentInfo:
        """Place, number, build, and load a committed checkpoint if one is given. Returns rank 0's `StudentInfo`.

        Raises `InsufficientResources` where the group's node is gone and no other takes its ranks.
        """
        try:
            return await self._start(checkpoint)
        except (StudentsLost, Defect) as lost:
            logs = [last_words(self._folder, f"student-{index}") for index in range(self.world)]
            told = next((words for words in logs if words.error), logs[0])
            raise type(lost)(told.after(str(lost))) from None

    async def _start(self, checkpoint: Path | None) -> StudentInfo:
        await self._until_placed()
        timeout_s, started = self._job.plan.start_timeout_s, time.time()
        actors = [self._spawn(index, f"student-{index}") for index in range(self.world)]
        self._ranks, self.processes = actors, []
        where = await self._gather([actor.where.remote() for actor in actors], timeout_s, "student processes to start")
        places = number_ranks([(index, process.node, gpus) for index, (process, gpus, _) in enumerate(where)])
        self._ranks = [actors[place.actor] for place in places]
        self.processes = [where[place.actor][0] for place in places]
        for place, process in zip(places, self.processes, strict=True):
            self._observer.event("process", role=f"student-{place.rank}", pid=process.pid, node=process.node)
        address = where[places[0].actor][2]
        (port,) = await self._gather([self._ranks[0].free_port.remote()], timeout_s, "finding a port for the group")
        builds = [
            rank.build.remote(self._job, place, self.world, address, port)
            for rank, place in zip(self._ranks, places, strict=True)
        ]
        infos = await self._gather(builds, timeout_s, "the student to load")
        if checkpoint is not None:
            await self._all("load", checkpoint, timeout_s=timeout_s, what=f"loading {checkpoint.name}")
        self._observer.span("student", "start", started, time.time())
        return infos[0]

    async def propose(self, batches: Sequence[RankBatch]) -> dict[str, RowIdsRef]:
        asked = [units_taking_ids(batch, self._tasks) for batch in batches]
        answers = [
            rank.propose.options(num_returns=1 + len(units)).remote(batch)
            for rank, batch, units in zip(self._ranks, batches, asked, strict=True)
        ]
        refs = [answer if isinstance(answer, list) else [answer] for answer in answers]
        what = f"the choice of ids for step {batches[0].step}"
        await self._gather([of_rank[0] for of_rank in refs], self._faults.step_timeout_s, what)
        return {
            unit.id: ref
            for units, of_rank in zip(asked, refs, strict=True)
            for unit, ref in zip(units, of_rank[1:], strict=True)
        }

    async def weights(self, version: int, index: int, form: WeightForm) -> tuple[BucketHeader, BucketRef]:
        """The bucket lies where rank 0 is."""
        refs = [rank.weights.options(num_returns=2).remote(version, index, form) for rank in self._ranks]
        what = f"gathering the weights after step {version}"
        headers = await self._gather([header for header, _ in refs], self._faults.step_timeout_s, what)
        return headers[0], refs[0][1]

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        return (await self._all("probe", token_ids, what="the probe of the weights"))[0]

    async def stage(self, batches: Sequence[RankBatch], blocks: Sequence[Sequence[BlockRef]]) -> None:
        refs = [
            rank.stage.remote(batch, *rank_blocks)
            for rank, batch, rank_blocks in zip(self._ranks, batches, blocks, strict=True)
        ]
        await self._staged(refs, [_ids(batch.units) for batch in batches])

    async def stage_evaluation(
        self, units: Sequence[Sequence[Unit]], blocks: Sequence[Sequence[BlockRef | None]]
    ) -> None:
        refs = [
            rank.stage_evaluation.remote(list(rank_units), *rank_blocks)
            for rank, rank_units, rank_blocks in zip(self._ranks, units, blocks, strict=True)
        ]
        await self._staged(refs, [_ids(rank_units) for rank_units in units])

    async def step(self, step: int) -> StepMetrics:
        return (await self._all("step", step, what=f"step {step}"))[0]

    async def evaluate(self, step: int) -> Evaluation:
        viewer = self._job.run.report.viewer_sequences
        return (await self._all("evaluate", step, viewer, what=f"the evaluation after step {step}"))[0]

    async def save(self, step: int, folder: Path) -> None:
        await self._all("save", step, folder, what=f"the checkpoint of step {step}")

    async def export(self, folder: Path) -> None:
        """Write the student as a Hugging Face folder (rank 0 writes)."""
        await self._all("export", folder, what="the export of the student")

    async def generate(
        self, prompts: Sequence[np.ndarray], *, max_new_tokens: int, stop_ids: tuple[int, ...]
    ) -> list[np.ndarray]:
        """Greedy continuations of rank 0; all ranks run the same forwards, so it works at ZeRO-3."""
        keywords = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
        return (await self._all("generate", list(prompts), what="generation", keywords=keywords))[0]

    async def self_test(self) -> tuple[SelfTestResult, ...]:
        return (await self._all("self_test", what="the self-test of the student"))[0]

    def placed_processes(self) -> list[PlacedProcess]:
        """Where the ranks are."""
        return [PlacedProcess(f"student-{rank}", process.node) for rank, process in enumerate(self.processes)]

    async def close(self) -> None:
        """Leave the process group in order, then end the processes; bounded."""
        refs = [rank.call.remote("close") for rank in self._ranks]
        await asyncio.gather(*(answer(ref, 15.0) for ref in refs), return_exceptions=True)
        await self.kill()

    async def kill(self) -> None:
        """End every rank at once, dead and hanging ones included."""
        known = self.processes or [None] * len(self._ranks)
        pairs = zip(self._ranks, known, strict=True)
        refs = [ref for rank, process in pairs for ref in kill_actor(rank, process)]
        await asyncio.to_thread(wait_killed, refs)
        self._ranks, self.processes = [], []

    async def _all(
        self, method: str, *args: Any, what: str, timeout_s: float | None = None, keywords: dict[str, Any] | None = None
    ) -> list[Any]:
        refs = [rank.call.remote(method, *args, **(keywords or {})) for rank in self._ranks]
        return await self._gather(refs, timeout_s or self._faults.step_timeout_s, what)

    async def _gather(self, refs: list[Any], timeout_s: float, what: str) -> list[Any]:
        """Every rank's answer, or the one error that explains the failure of the group."""
        waits = [asyncio.ensure_future(answer(ref, timeout_s)) for ref in refs]
        try:
            _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_EXCEPTION)
            if pending:
                await asyncio.wait(pending, timeout=FAILURE_GRACE_S)
        finally:
            for wait in waits:
                wait.cancel()
        done = {index: wait for index, wait in enumerate(waits) if wait.done() and not wait.cancelled()}
        failed = {index: wait.exception() for index, wait in done.items() if wait.exception()}
        if failed:
            raise group_error(failed, what)
        return [wait.result() for wait in waits]

    async def _staged(self, refs: list[Any], units: list[list[str]]) -> None:
        """Wait for `stage` on every rank, separating lost blocks from failed ranks."""
        waits = [answer(ref, self._faults.step_timeout_s) for ref in refs]
        results = await asyncio.gather(*waits, return_exceptions=True)
        lost: list[str] = []
        failed: dict[int, BaseException] = {}
        for index, result in enumerate(results):
            if isinstance(result, BaseException):
                if isinstance(unwrap(result), ObjectLostError | GetTimeoutError):
                    lost.extend(units[index])
                else:
                    failed[index] = result
        if failed:
            raise group_error(failed, "staging of labels")
        if lost:
            raise LabelsLost(lost)


def _ids(units: Sequence[Unit]) -> list[str]:
    """Of what teachers were asked about them."""
    return [one.id for unit in units for one in unit.asked()]
