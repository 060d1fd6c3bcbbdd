"""One run from started roles to an exported student: the program of the controller, free of Ray.

start roles -> self-tests -> held-out labels, evaluation, generations before -> loops -> generations after, export
                                                                                ^                            |
                                a lost student group: whole restart from the  --+----------------------------+
                                last committed checkpoint, decided by a policy
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, Diverged, Preempted, StudentsLost
from trainer.loop.checkpoint import Checkpoints, Committed
from trainer.loop.held_out import HeldOut
from trainer.loop.hooks import Checkpoint, CheckpointWriter, Evaluate
from trainer.loop.policy import Policy
from trainer.loop.scoring import UnitScorers, first_error
from trainer.loop.start_checks import check_students, check_teachers
from trainer.loop.supply import Supply
from trainer.loop.train import Loops
from trainer.loop.weight_sync import WeightSync, sync_settings
from trainer.protocols import Hook, Observer, SelfTestResult, Session, StudentInfo
from trainer.threads import in_thread
from trainer.types import Cursor

if TYPE_CHECKING:
    from trainer.loop.job import Job


class Setbacks:
    """Losses of the student group in a row with nothing gained in between.

    A gain is a step that was never trained before, or a newer checkpoint. Steps trained again after a restart are none:
    a failure that always comes at the same step would be tried again for ever.
    """

    def __init__(self, step: int) -> None:
        self.count = 0
        self._furthest = step

    def add(self, *, from_step: int, last_step: int, last_saved: int) -> None:
        """One more, of loops that began after `from_step`."""
        gained = last_step > self._furthest or last_saved > from_step
        self._furthest = max(self._furthest, last_step)
        self.count = 1 if gained else self.count + 1


class Controller:
    """Drives one session through one job."""

    def __init__(
        self,
        job: Job,
        session: Session,
        observer: Observer,
        *,
        stop_requested: asyncio.Event,
        restart_after: Callable[[int], float | None],
    ) -> None:
        """`restart_after(setbacks)` is the failure policy of the student group: seconds to wait, or None to give up."""
        self._job = job
        self._session = session
        self._observer = observer
        self._stop_requested = stop_requested
        self._restart_after = restart_after
        self._checkpoints = Checkpoints(
            job.folder.checkpoints,
            keep=job.run.training.keep_checkpoints,
            note=lambda text: observer.event("note", text=text),
        )
        self._held_out = HeldOut(job, session, observer)
        rollouts = job.run.rollouts
        self._policy = Policy(depth=job.loop.depth, sync_every=1 if rollouts is None else rollouts.sync_every)
        self._source = job.source(session.teachers, session.rollouts, self._policy)
        write = CheckpointWriter(job, self._checkpoints, session.students, observer, also=self._policy.save)
        self._checkpoint = Checkpoint(write, observer, job.loop)
        self._evaluate = Evaluate(session.students, observer, job.loop, self._checkpoint)
        self._hooks: list[Hook] = [self._evaluate, self._checkpoint]
        self.in_loops = False  # while it is, a requested stop saves a checkpoint; otherwise there is nothing to save
        self.student_restarts = 0
        self.non_finite_steps = 0
        self.self_tests: tuple[SelfTestResult, ...] = ()
        self.student_info: StudentInfo | None = None
        self.resumed_from: int | None = None

    async def run(self) -> None:
        """Everything from starting the roles to the exported student. The caller closes the session."""
        await in_thread(self._checkpoints.sweep)
        committed = await self._latest()
        self._observer.phase("starting teachers and students")
        await self._start(committed.folder if committed else None)
        self._add_sync()
        self._observer.phase("self-tests, scoring held-out rows")
        await self._check_and_look(first=committed is None)
        step = 0
        if committed is not None:
            step = self.resumed_from = committed.state.step
            self._source.seek(committed.state.cursor)
            self.non_finite_steps = committed.state.non_finite_steps
            self._observer.event("resumed", from_step=step)
        self._policy.begin(step, None if committed is None else committed.folder)
        self._observer.phase("training")
        await self._train(step)

    async def _check_and_look(self, *, first: bool) -> None:
        """Self-tests; and while the test of the labels runs a teacher in this process, what else is asked of the others
        before step 1. Students do one thing at a time.

        `first`: nothing is trained yet, so the student is evaluated.
        """
        job, session, observer = self._job, self._session, self._observer
        students = await check_students(job, session, observer)
        labels, _ = await self._at_once(check_teachers(job, session, observer), self._held_out_rows(first=first))
        self.self_tests = (*students, *labels)

    async def _held_out_rows(self, *, first: bool) -> None:
        await self._held_out.prepare()
        if first:
            self._observer.phase("testing labels, evaluating the student before training")
            await self._at_once(self._held_out.look("before", 0), self._held_out.ask_teacher())

    async def _at_once(self, *work: Coroutine[Any, Any, Any]) -> list[Any]:
        """What each returns, or the error of the first that fails."""
        limit = asyncio.Semaphore(1 if self._session.in_one_process else len(work))

        async def within(one: Coroutine[Any, Any, Any]) -> Any:
            async with limit:
                return await one

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(within(one)) for one in work]
        except BaseExceptionGroup as errors:
            for one in work:
                one.close()  # those that were not begun
            raise first_error(errors) from None
        return [task.result() for task in tasks]

    async def _start(self, checkpoint: Path | None) -> None:
        """Teachers and students load at the same time: start-up is mostly imports and weights."""
        try:
            async with asyncio.TaskGroup() as roles:
                roles.create_task(self._session.start_teachers())
                students = roles.create_task(self._session.students.start(checkpoint))
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        self.student_info = students.result()
        if self.student_info.products:
            self._observer.event("products", role="student", chosen=self.student_info.products)

    def _add_sync(self) -> None:
        """First of the hooks: the engines write while the student is evaluated."""
        session, info = self._session, self.student_info
        if session.rollouts is not None and info is not None:
            settings = sync_settings(self._job, info.dtype, session.rollouts.form.dtype)
            sync = WeightSync(session.students, session.rollouts, self._policy, self._observer, settings)
            self._hooks.insert(0, sync)

    async def _train(self, step: int) -> None:
        """The loops and what follows them, from the last committed checkpoint again whenever the student group is lost.
        After the last step that is the one of this step: then only what follows is done again."""
        start = self._source.cursor
        setbacks = Setbacks(step)
        while True:
            loops = self._new_loops()
            try:
                self.in_loops = True
                await loops.run(step)
                self.in_loops = False
                await self._conclude()
                return
            except StudentsLost as error:
                lost = error
            finally:
                self.in_loops = False
            at_step = min(loops.last_step + 1, self._job.loop.total_steps)
            setbacks.add(from_step=step, last_step=loops.last_step, last_saved=self._checkpoint.saved_step)
            step = await self._recover(lost, setbacks, at_step=at_step, start=start)

    def _new_loops(self) -> Loops:
        job, students = self._job, self._session.students
        supply = Supply(
            self._source,
            UnitScorers(
                self._session.teachers,
                job.labels,
                job.ensembles,
                job.joined,
                note=lambda text: self._observer.event("note", text=text),
            ),
            students,
            settings=job.loop,
            observer=self._observer,
        )
        return Loops(
            supply,
            students,
            self._hooks,
            settings=job.loop,
            observer=self._observer,
            stop_requested=self._stop_requested,
            non_finite_steps=self.non_finite_steps,
        )

    async def _conclude(self) -> None:
        total, latest = self._job.loop.total_steps, self._evaluate.latest
        self._observer.phase("generating after training, exporting the student")
        await self._held_out.look("after", total, evaluated=latest is not None and latest.step == total)
        try:
            await self._session.students.export(self._job.folder.student)
        except Diverged as error:
            raise Diverged(
                f"{error}. The checkpoint of step {total} in {self._job.folder.checkpoints} holds "
                "them too: without it the same command goes on from the one before, if there is one. Lower "
                "optimizer.learning_rate, in a run of another name"
            ) from None

    async def _recover(self, lost: StudentsLost, setbacks: Setbacks, *, at_step: int, start: Cursor) -> int:
        """Restart the group until it stands, as often as the policy allows: the next node may die as well.

        Returns the step it continues after.
        """
        while True:
            self._observer.event("students_lost", reason=str(lost), at_step=at_step)
            if self._stop_requested.is_set():
                raise Preempted(
                    f"the student group was lost in step {at_step} while the run was stopping; run the same command "
                    "again to go on from the last checkpoint"
                )
            delay_s = self._restart_after(setbacks.count)
            if delay_s is None:
                raise lost
            await asyncio.sleep(delay_s)
            try:
                return await self._restart_students(start)
            except StudentsLost as again:
                lost = again
                setbacks.count += 1

    async def _restart_students(self, start: Cursor) -> int:
        """Kill what is left of the group and build a new one; returns the step it continues after."""
        self.student_restarts += 1
        await self._session.students.kill()
        await in_thread(self._checkpoints.sweep)  # they may have died of a full disk, while they wrote
        committed = await self._latest()
        await self._session.students.start(committed.folder if committed else None)
        await self._held_out.stage()
        step = committed.state.step if committed else 0
        self.non_finite_steps = committed.state.non_finite_steps if committed else 0
        self._source.seek(committed.state.cursor if committed else start)
        self._policy.begin(step, None if committed is None else committed.folder)
        self._observer.event("students_restarted", from_step=step, restarts=self.student_restarts)
        return step

    async def _latest(self) -> Committed | None:
        """Raises ConfigError where the run would end elsewhere from there: its newest checkpoint, by which its length
        was found, is damaged."""
        found = await in_thread(self._checkpoints.latest, config_hash=self._job.config_hash)
        total = self._job.total_steps_after(found.state if found else None)
        if total != self._job.loop.total_steps:
            raise ConfigError(
                f"the newest checkpoint in {self._job.folder.checkpoints} is damaged, and by it the run was taken to "
                f"have {self._job.loop.total_steps} steps, not {total}: remove it, and run the same command again"
            )
        return found
