"""The pipeline of a real run, trained for a few steps whenever asked, with the CPU time of each of its parts.

Roles, loops and records are those of `stillhouse train`; self-tests, evaluation and checkpoints are left out. Every
call of `train` begins and ends with nothing under way, so each part worked on exactly the tokens of those steps.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from benchmarks import cpu_time
from benchmarks.cpu_time import CpuTime
from cluster.lifecycle import ray_session
from cluster.placement.hardware import Hardware
from cluster.placement.resolve import Resolved
from cluster.session import RaySession
from cluster.students.group import StudentJob
from configs.load import config_hash, run_folder
from configs.schema import Run
from launch.report.metrics import MetricsLog, Timeline
from launch.report.observer import RunObserver
from launch.report.progress import Progress
from launch.resolving import resolve_run
from trainer.loop.control_ids import with_control_ids
from trainer.loop.inputs import Inputs, read_inputs
from trainer.loop.job import make_job
from trainer.loop.scoring import UnitScorers, first_error
from trainer.loop.supply import Supply
from trainer.loop.train import Loops
from trainer.run_folder import RunFolder
from trainer.types import StepMetrics

TEACHER, STUDENT, CONTROLLER, DAEMONS = "teacher", "student", "controller", "Ray's own"
PARTS = (TEACHER, STUDENT, CONTROLLER, DAEMONS)


@dataclass(frozen=True, slots=True)
class Segment:
    """Some steps in a row of one side of the comparison."""

    side: str
    round: int
    cpu: Mapping[str, CpuTime]  # by part
    steps: int
    tokens: int  # every token that is no padding, prompts included
    loss_tokens: int
    wall_s: float
    loss: float  # mean over the steps


class Ledger(RunObserver):
    """A run's usual observer, remembering processes and steps."""

    def __init__(self, *, metrics: MetricsLog, timeline: Timeline, progress: Progress) -> None:
        super().__init__(metrics=metrics, timeline=timeline, progress=progress)
        self.processes: dict[str, int] = {}  # pid of each role
        self.steps: list[StepMetrics] = []

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        super().step(metrics)

    def event(self, name: str, **fields: Any) -> None:
        if name == "process":
            self.processes[fields["role"]] = fields["pid"]
        super().event(name, **fields)


class Pipeline:
    """One teacher and one student on a running Ray cluster of this machine."""

    def __init__(self, run: Run) -> None:
        """Reads and resolves; starts nothing."""
        self.inputs: Inputs = read_inputs(run)
        self.run = run = with_control_ids(run, self.inputs)
        self.resolved: Resolved = resolve_run(run, self.inputs, Hardware.local())
        self._closing = AsyncExitStack()
        self._trained = 0

    async def start(self) -> None:
        """All roles up. The caller closes the pipeline, also after an error here."""
        folder = RunFolder.create(run_folder(self.run))
        self._job = make_job(
            self.run,
            self.inputs,
            folder,
            config_hash=config_hash(self.run),
            teacher_dtypes=self.resolved.teacher_dtypes,
            skip_self_test=True,
        )
        progress = self._closing.enter_context(Progress(0, console=Console(file=io.StringIO()), plain=True))
        self._ledger = Ledger(metrics=MetricsLog(folder), timeline=Timeline(folder), progress=progress)
        self._closing.callback(self._ledger.close)
        student = StudentJob(
            run=self.run,
            plan=self.resolved.student,
            vocabulary=self.inputs.vocabulary,
            total_steps=self._job.loop.total_steps,
        )
        self._session = RaySession(student, self.resolved, folder=folder, observer=self._ledger)
        self._closing.push_async_callback(self._session.close)
        self._source = self._job.source(self._session.teachers)
        await self._session.reserve()
        try:
            async with asyncio.TaskGroup() as roles:
                roles.create_task(self._session.start_teachers())
                roles.create_task(self._session.students.start(None))
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    async def train(self, steps: int, *, round: int, daemons: Daemons) -> Segment:
        """The next `steps` steps."""
        before, started, first = self._cpu(daemons), time.monotonic(), len(self._ledger.steps)
        settings, students = replace(self._job.loop, total_steps=self._trained + steps), self._session.students
        supply = Supply(
            self._source,
            UnitScorers(self._session.teachers, self._job.labels),
            students,
            settings=settings,
            observer=self._ledger,
        )
        stop = asyncio.Event()
        loops = Loops(supply, students, [], settings=settings, observer=self._ledger, stop_requested=stop)
        await loops.run(self._trained)
        self._trained += steps
        after = self._cpu(daemons)
        metrics = [record.values for record in self._ledger.steps[first:]]
        return Segment(
            side=self.run.labels.kind,
            round=round,
            cpu={part: after[part] - before[part] for part in PARTS},
            steps=steps,
            tokens=int(sum(values["train/tokens"] for values in metrics)),
            loss_tokens=int(sum(values["train/loss_tokens"] for values in metrics)),
            wall_s=time.monotonic() - started,
            loss=sum(values["train/loss"] for values in metrics) / steps,
        )

    @property
    def role_pids(self) -> tuple[int, ...]:
        return tuple(self._ledger.processes.values())

    def _cpu(self, daemons: Daemons) -> dict[str, CpuTime]:
        roles = self._ledger.processes
        student = [pid for role, pid in roles.items() if role.startswith("student")]
        teacher = [pid for role, pid in roles.items() if not role.startswith("student")]
        return {
            TEACHER: cpu_time.of_trees(teacher),
            STUDENT: cpu_time.of_trees(student),
            CONTROLLER: cpu_time.of_this_process(),
            DAEMONS: daemons.cpu(),
        }

    async def close(self) -> None:
        """Nothing of it is left running."""
        await self._closing.aclose()


class Daemons:
    """Ray's own processes: all that it started but the roles of these pipelines."""

    def __init__(self, cluster: ray_session.RayCluster, pipelines: list[Pipeline]) -> None:
        self._cluster = cluster
        self._pipelines = pipelines

    def cpu(self) -> CpuTime:
        roles = [pid for pipeline in self._pipelines for pid in pipeline.role_pids]
        return cpu_time.of_trees(self._cluster.processes, without=roles)
