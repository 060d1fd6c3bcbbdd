"""`stillhouse label`: make the labels that a run will ask for and put them into its store, without a student.

rows of the run, held-out rows -> those that the store does not hold -> scorers, each behind the store -> shards

Stopped or killed, the same command goes on: what is in the store is read and checked, and not made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.preflight.machine import existing, size_text
from configs.load import LoadedRun, load_run, run_folder
from configs.rules import station_place
from configs.schema import Run
from launch.check.run import raise_problems
from launch.label_progress import LabelProgress
from launch.quiet import quiet_libraries
from launch.runtimes import Runtime, open_runtime
from launch.stopping import preemptible
from launch.stored import Spaces, batches, by_space
from trainer.errors import ConfigError, InfrastructureError
from trainer.labels.store import LabelStore
from trainer.labels.store_space import LabelSpace
from trainer.labels.store_writer import Limits
from trainer.loop.control_ids import with_control_ids
from trainer.loop.inputs import Inputs
from trainer.loop.job import make_job
from trainer.loop.rows import Wanted, wanted_labels
from trainer.loop.scoring import first_error
from trainer.loop.start_checks import check_teachers
from trainer.protocols import Session
from trainer.run_folder import RunFolder
from trainer.threads import in_thread
from trainer.types import Sequence, Unit

IN_FLIGHT = 3  # units per replica: two inside, and one that is ready


def label(path: Path, overrides: list[str], *, skip_self_test: bool = False) -> int:
    """Returns the exit code; raises StillhouseError."""
    with preemptible():
        quiet_libraries()
        loaded = _with_teachers(load_run(path, overrides))
        warnings, inputs = raise_problems(loaded)
        folder = RunFolder.create(_folder(loaded.run))
        with folder.lock(), contextlib.ExitStack() as stack:
            run = with_control_ids(loaded.run, inputs)
            runtime = open_runtime(run, inputs, stack, with_students=False)
            progress = stack.enter_context(LabelProgress())
            for text in (*warnings, *runtime.resolved.reasons, *runtime.warnings):
                progress.note(text)
            asyncio.run(_Labelling(run, inputs, runtime, progress).run(folder, skip_self_test=skip_self_test))
    return 0


def _folder(run: Run) -> Path:
    """For logs: beside the folder of the run itself, which is not begun by this."""
    folder = run_folder(run)
    return folder.with_name(f"{folder.name}.label")


def _with_teachers(loaded: LoadedRun) -> LoadedRun:
    """The run as it is labelled: `store.mode: only` is how it is trained afterwards."""
    run = loaded.run
    if run.store is None:
        raise ConfigError("label needs to know where labels are kept: add store: {path: labels} to the configuration")
    if run.store.mode == "read_only":
        raise ConfigError("store.mode: read_only keeps no labels; write mode: read_write, or only")
    for task in run.resolved_tasks().values():
        if task.answers.needs_generator or task.answers.needs_rollouts:
            raise ConfigError(
                f"{station_place(run, task, 'answers')}: {task.answers.kind} are written while the student trains, so "
                "their labels cannot be made before: write answers: dataset, or let train fill the store"
            )
        if task.soft_labels is not None and task.soft_labels.takes_ids:
            raise ConfigError(
                f"{station_place(run, task, 'labels')}: {task.labels.kind} are of ids that the student of the moment "
                "chooses, so they cannot be made before: write other labels, or train without store"
            )
    store = run.store.model_copy(update={"mode": "read_write"})
    return replace(loaded, run=run.model_copy(update={"store": store}))


@dataclass
class _Labelling:
    """One start of the command."""

    configured: Run
    inputs: Inputs
    runtime: Runtime
    progress: LabelProgress
    wanted: dict[str, tuple[LabelSpace, set[bytes]]] = field(default_factory=dict)  # by space
    num_units: int = 0

    async def run(self, folder: RunFolder, *, skip_self_test: bool) -> None:
        run, resolved = self.configured, self.runtime.resolved
        job = make_job(
            run,
            self.inputs,
            folder,
            config_hash="",
            teacher_dtypes=resolved.teacher_dtypes,
            skip_self_test=skip_self_test,
        )
        self.progress.expect(job)
        session = self.runtime.open_session(job, self.progress)
        try:
            await session.reserve()
            await session.check_nodes()
            self.progress.phase("starting teachers")
            await session.start_teachers()
            self.progress.phase("testing labels")
            await check_teachers(job, session, self.progress)
            self.progress.phase("making labels")
            await self._fill(session)
            self.progress.phase("stopping the teachers")
        finally:
            await session.close()  # what waits in their memory is written
        self._refuse_incomplete()

    async def _fill(self, session: Session) -> None:
        run = self.configured
        store = LabelStore(run.store.path, limits=Limits(run.store.max_bytes))  # it puts damaged shards aside
        spaces, wanted = Spaces(self.runtime.resolved), batches(wanted_labels(run, self.inputs))
        replicas = sum(run.teachers_by_name()[name].scorer.replicas for name in session.teachers)
        free = asyncio.Semaphore(IN_FLIGHT * replicas)
        try:
            async with asyncio.TaskGroup() as group:
                while batch := await in_thread(next, wanted, None):
                    for space, labels in by_space(batch, spaces):
                        known = self.wanted.setdefault(space.id, (space, set()))[1]
                        new = {key: one for key, one in labels.items() if key not in known}
                        known.update(new)
                        unread = await in_thread(store.unreadable, space, new)
                        self.progress.found(len(new) - len(unread))
                        for text in store.notes():
                            self.progress.note(text)
                        missing = [new[key] for key in unread]
                        for unit in self._cut(missing):
                            await free.acquire()
                            group.create_task(self._score(session, unit, missing[0], free))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    def _cut(self, missing: list[Wanted]) -> Iterator[Unit]:
        """Units of about a micro-batch of tokens; all are of one teacher and encoding."""
        members, tokens = [], 0
        for one in missing:
            if members and tokens + one.sequence.num_tokens > self.configured.training.micro_batch_tokens:
                yield self._unit(members)
                members, tokens = [], 0
            members.append(one.sequence)
            tokens += one.sequence.num_tokens
        if members:
            yield self._unit(members)

    def _unit(self, members: list[Sequence]) -> Unit:
        self.num_units += 1
        return Unit(f"label/{self.num_units}", tuple(members))

    async def _score(self, session: Session, unit: Unit, one: Wanted, free: asyncio.Semaphore) -> None:
        try:
            scorer = session.teachers[one.teacher].scorer
            assert scorer is not None, one.teacher
            report, _ = await scorer.score(unit, one.labels)
            if report.store is not None and not report.store.keeps:
                raise InfrastructureError(
                    f"{self.configured.store.path} keeps no more labels, so that no more are made; {self._room()}"
                )
            self.progress.made(len(unit.sequences), report)
        finally:
            free.release()

    def _refuse_incomplete(self) -> None:
        """Raises `InfrastructureError` where not all labels were kept; why was told."""
        store = LabelStore(self.configured.store.path, limits=None)
        total = sum(len(keys) for _, keys in self.wanted.values())
        lacking = sum(len(store.missing(space, keys)) for space, keys in self.wanted.values())
        if lacking:
            raise InfrastructureError(
                f"{lacking} of {total} sequences have no labels in {self.configured.store.path}; {self._room()}"
            )

    def _room(self) -> str:
        """What there is, and what to do."""
        store = self.configured.store
        used, free = LabelStore(store.path, limits=None).num_bytes(), shutil.disk_usage(existing(store.path)).free
        return (
            f"it holds {size_text(used)} of store.max_bytes {size_text(store.max_bytes)}, and its disk has "
            f"{size_text(free)} left, of which {size_text(Limits(store.max_bytes).free_bytes)} are left alone: make "
            "room there, or raise store.max_bytes, and run the same command again, which goes on"
        )
