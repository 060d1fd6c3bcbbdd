"""`runtime: in_process`: the same roles as plain objects of this process, under a debugger if you like. No Ray.

Calls run where they are awaited, one after the other, so a breakpoint anywhere stops the whole run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster import runtime
from cluster.engines.plan import EnginePlan
from cluster.placement.resolve import Resolved
from cluster.rollouts.form import form_of
from cluster.rollouts.proof import Proof
from cluster.runtime import RankPlace
from cluster.students.group import StudentJob, on_local_copy
from cluster.teachers.actor import last_notes, start_engine
from cluster.teachers.pool import check_report, tell_notes
from configs.labels import Labels
from configs.models import Rollouts
from trainer.labels.joined import row_ids
from trainer.loop.plan import units_taking_ids
from trainer.protocols import GeneratingEngine, Observer, ScoringEngine, SelfTestResult, StudentInfo, TeacherPools
from trainer.types import (
    BucketHeader,
    Completion,
    Evaluation,
    GenerationRequest,
    Probe,
    RankBatch,
    RowIds,
    SoftLabelBlock,
    StepMetrics,
    Unit,
    UnitReport,
    WeightBucket,
    WeightForm,
)

if TYPE_CHECKING:
    from trainer.model.student import StudentRank


class InProcessTeacher:
    """One engine. Implements `Scorers` or `Generators`, by its plan."""

    def __init__(self, plan: EnginePlan, *, deadline_s: float, observer: Observer) -> None:
        self._plan = plan
        self._deadline_s = deadline_s
        self._observer = observer
        self._engine: ScoringEngine | GeneratingEngine | None = None
        self._told: set[str] = set()

    def start(self) -> None:
        self._engine = start_engine(self._plan, f"{self._plan.actors}-0")

    async def score(
        self, unit: Unit, encoding: Labels, given: RowIds | tuple[SoftLabelBlock, ...] | None = None
    ) -> tuple[UnitReport, SoftLabelBlock]:
        ids = row_ids(unit, encoding, given if isinstance(given, tuple) else (given,))
        report, block = await self._engine.score(unit, encoding, deadline_s=self._deadline_s, given=ids)
        check_report(report, unit)
        self._observer.span(report.replica, "score", report.started_s, report.started_s + report.score_s, unit.id)
        tell_notes(report.notes, self._told, self._observer)
        return report, block

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        return await self._engine.generate(requests, deadline_s=self._deadline_s)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            tell_notes(last_notes(self._engine), self._told, self._observer)


class InProcessRollouts(InProcessTeacher):
    """One engine that holds the student. Implements `trainer.protocols.Rollouts`."""

    def __init__(self, plan: EnginePlan, rollouts: Rollouts, *, deadline_s: float, observer: Observer) -> None:
        super().__init__(plan, deadline_s=deadline_s, observer=observer)
        self.form = form_of(plan, rollouts)
        self._proof = Proof(f"{plan.actors}-0")

    async def take(self, header: BucketHeader, bucket: WeightBucket) -> None:
        await self._engine.take(bucket, deadline_s=self._deadline_s)

    async def prove(self, probe: Probe) -> float:
        found = await self._engine.logprobs(probe.token_ids, deadline_s=self._deadline_s)
        return self._proof.gap(probe, found)


class InProcessStudents:
    """A group of one rank. Implements `trainer.protocols.StudentGroup`."""

    world = 1

    def __init__(self, job: StudentJob) -> None:
        self._job = job
        self._rank: StudentRank | None = None

    async def start(self, checkpoint: Path | None) -> StudentInfo:
        place = RankPlace(actor=0, rank=0, local_rank=0, local_size=1, node="here")
        port = runtime.free_port()
        os.environ.update(runtime.student_environment(place, world=1, address="127.0.0.1", port=port))
        from trainer.model.student import StudentRank

        device = runtime.device_of(self._job.plan.device_type)
        runtime.enter_device(device)
        self._rank = StudentRank(
            on_local_copy(self._job.run, timeout_s=self._job.plan.start_timeout_s),
            self._job.plan,
            rank=0,
            world=1,
            device=device,
            vocabulary=self._job.vocabulary,
            total_steps=self._job.total_steps,
        )
        info = self._rank.build()
        if checkpoint is not None:
            self._rank.load(checkpoint)
        return info

    async def propose(self, batches: Sequence[RankBatch]) -> dict[str, RowIds]:
        units = units_taking_ids(batches[0], self._job.run.resolved_tasks())
        return {unit.id: ids for unit, ids in zip(units, self._rank.propose(batches[0]), strict=True)}

    async def weights(self, version: int, index: int, form: WeightForm) -> tuple[BucketHeader, WeightBucket]:
        header, bucket = self._rank.weights(version, index, form)
        assert bucket is not None
        return header, bucket

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        return self._rank.probe(token_ids)

    async def stage(self, batches: Sequence[RankBatch], blocks: Sequence[Sequence[SoftLabelBlock]]) -> None:
        self._rank.stage(batches[0], blocks[0])

    async def step(self, step: int) -> StepMetrics:
        return self._rank.step(step)

    async def stage_evaluation(
        self, units: Sequence[Sequence[Unit]], blocks: Sequence[Sequence[SoftLabelBlock | None]]
    ) -> None:
        self._rank.stage_evaluation(units[0], blocks[0])

    async def evaluate(self, step: int) -> Evaluation:
        return self._rank.evaluate(step, self._job.run.report.viewer_sequences)

    async def save(self, step: int, folder: Path) -> None:
        self._rank.save(step, folder)

    async def export(self, folder: Path) -> None:
        self._rank.export(folder)

    async def generate(
        self, prompts: Sequence[np.ndarray], *, max_new_tokens: int, stop_ids: tuple[int, ...]
    ) -> list[np.ndarray]:
        return self._rank.generate(prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids)

    async def self_test(self) -> tuple[SelfTestResult, ...]:
        return self._rank.self_test()

    async def close(self) -> None:
        if self._rank is not None:
            self._rank.close()

    async def kill(self) -> None:
        """One process cannot outlive its only rank."""


class InProcessSession:
    """All roles of a run in this process. Implements `trainer.protocols.Session`."""

    in_one_process = True

    def __init__(self, job: StudentJob, resolved: Resolved, *, observer: Observer) -> None:
        deadline_s = job.run.faults.score_timeout_s
        for plan in resolved.engines:
            os.environ.update(plan.environment)
        os.environ.update(resolved.student_environment)
        self._engines: list[InProcessTeacher] = []

        def started(plan: EnginePlan | None) -> InProcessTeacher | None:
            if plan is None:
                return None
            self._engines.append(InProcessTeacher(plan, deadline_s=deadline_s, observer=observer))
            return self._engines[-1]

        self.teachers = {
            name: TeacherPools(started(plans.scorer), started(plans.generator))
            for name, plans in resolved.teachers.items()
        }
        self.rollouts: InProcessRollouts | None = None
        if resolved.rollouts is not None:
            assert job.run.rollouts is not None
            self.rollouts = InProcessRollouts(
                resolved.rollouts, job.run.rollouts, deadline_s=deadline_s, observer=observer
            )
            self._engines.append(self.rollouts)
        self.students = InProcessStudents(job)

    async def reserve(self) -> None:
        """Everything is this process's own."""

    async def check_nodes(self) -> None:
        """There are none."""

    async def start_teachers(self) -> None:
        for engine in self._engines:
            engine.start()

    def read_block(self, ref: SoftLabelBlock) -> SoftLabelBlock:
        return ref

    async def watch_for_drain(self, stop: Callable[[str], None]) -> None:
        """Nothing is taken away."""

    async def close(self) -> None:
        await self.students.close()
        for engine in self._engines:
            engine.close()
