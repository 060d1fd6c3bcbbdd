"""One run from started roles to an exported student: the program of the controller, free of Ray.

start roles -> self-tests -> held-out labels, evaluation, generations before -> loops -> generations after, export
                                                                                ^                            |
                                a lost student group: whole restart from the  --+----------------------------+
                                last committed checkpoint, decided by a policy
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.labels import HELD_OUT, Labels, TopK
from trainer.checks.label_check import LabelCheck, check_labels, plan_check, teacher_lengths
from trainer.data.readable import prompt_of
from trainer.errors import (
    ConfigError,
    Diverged,
    InfrastructureError,
    LabelsLost,
    Preempted,
    SelfTestError,
    StillhouseError,
    StudentsLost,
)
from trainer.loop.checkpoint import Checkpoints, Committed
from trainer.loop.job import Job
from trainer.loop.loops import Loops, Observer, first_error
from trainer.loop.manifest import TrainingState
from trainer.loop.plan import cut_units, plan_step
from trainer.model.head import Head
from trainer.protocols import Session
from trainer.threads import in_thread
from trainer.types import BlockRef, Cursor, Evaluation, Prompt, Sequence, SoftLabelBlock, Unit

MAX_FAILED_SAVES = 3


class Setbacks:
    """Losses of the student group in a row with nothing gained in between.

    A gain is a step that was never trained before, or a newer checkpoint. Steps trained again after a restart are none:
    a failure that always comes at the same step would be tried again for ever.
    """

    def __init__(self, step: int) -> None:
        self.count = 0
        self._furthest = step

    def add(self, *, from_step: int, last_step: int, last_saved: int | None) -> None:
        """One more, of loops that began after `from_step`."""
        gained = last_step > self._furthest or (last_saved or 0) > from_step
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
        read_block: Callable[[BlockRef], SoftLabelBlock],
        restart_after: Callable[[int], float | None],
        teacher_truth: Callable[[Unit], tuple[Head, torch.Tensor | None]],
        teacher_answers: Callable[[list[np.ndarray]], list[np.ndarray] | None],
        teacher_dtype: str,
        on_evaluation: Callable[[str, Evaluation], None],
        on_generation: Callable[[str, tuple[Sequence, ...], list[np.ndarray]], None],
        on_phase: Callable[[str], None],
    ) -> None:
        """`restart_after(setbacks)` is the failure policy of the student group: seconds to wait, or None to give up.
        For the label self-test, `read_block` brings a block into this process and `teacher_truth(unit)` gives
        `(Head, reference logits or None)`. `teacher_answers(prompts)` writes for the report where the session has no
        writers, or gives None."""
        self._job = job
        self._session = session
        self._observer = observer
        self._stop_requested = stop_requested
        self._read_block = read_block
        self._restart_after = restart_after
        self._teacher_truth = teacher_truth
        self._teacher_answers = teacher_answers
        self._teacher_dtype = teacher_dtype
        self._on_phase = on_phase
        self._on_evaluation = on_evaluation
        self._on_generation = on_generation
        self._checkpoints = Checkpoints(
            job.folder.checkpoints,
            keep=job.run.training.keep_checkpoints,
            note=lambda text: observer.event("note", text=text),
        )
        self._evaluation_units: list[list[Unit]] = []
        self._evaluation_blocks: dict[str, BlockRef] = {}
        self._failed_saves = 0
        self.in_loops = False  # while it is, a requested stop saves a checkpoint; otherwise there is nothing to save
        self.student_restarts = 0
        self.non_finite_steps = 0
        self.self_tests: tuple[Any, ...] = ()
        self.student_info: Any = None
        self.resumed_from: int | None = None
        self.final_evaluation: Evaluation | None = None

    async def run(self) -> None:
        """Everything from starting the roles to the exported student. The caller closes the session."""
        await in_thread(self._checkpoints.sweep)
        committed = await self._latest()
        self._on_phase("starting teachers and students")
        await self._start(committed.folder if committed else None)
        self._on_phase("self-tests")
        await self._self_test()
        self._on_phase("scoring held-out rows")
        await self._prepare_evaluation()
        step = 0
        if committed is not None:
            step = self.resumed_from = committed.state.step
            self._job.stream.seek(committed.state.cursor)
            self.non_finite_steps = committed.state.non_finite_steps
            self._observer.event("resumed", from_step=step)
        else:
            self._on_phase("evaluating the student before training")
            try:
                async with asyncio.TaskGroup() as looks:
                    looks.create_task(self._look("before", 0))
                    looks.create_task(self._ask_teacher())
            except BaseExceptionGroup as group:
                raise first_error(group) from None
        self._on_phase("training")
        await self._train(step)

    async def _start(self, checkpoint: Path | None) -> None:
        """Teachers and students load at the same time: start-up is mostly imports and weights."""
        try:
            async with asyncio.TaskGroup() as roles:
                roles.create_task(self._session.start_teachers())
                students = roles.create_task(self._session.students.start(checkpoint))
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        self.student_info = students.result()

    async def _self_test(self) -> None:
        """Refuse to train on this machine if labels, packing, loss or collectives are wrong on it."""
        if self._job.skip_self_test:
            self._observer.event("self_test_skipped")
            return
        student = await self._session.students.self_test()
        results = (*student, *await self._check_labels())
        self.self_tests = results
        for result in results:
            self._observer.event("self_test", test=result.name, passed=result.passed, numbers=result.numbers)
        failed = [f"{result.name}: {result.numbers}" for result in results if not result.passed]
        if failed:
            raise SelfTestError(
                "the start-up self-test failed, so training would learn from wrong numbers:\n  "
                + "\n  ".join(failed)
                + "\nEither this machine computes wrongly (a driver, a kernel, an interconnect), or the model's code "
                "does what is not covered here. --skip-self-test trains all the same, and the report says so"
            )

    async def _check_labels(self) -> tuple[LabelCheck, ...]:
        run = self._job.run
        lengths = await asyncio.to_thread(teacher_lengths, run.teacher.model)
        plan = plan_check(self._job.samples or self._job.evaluation, lengths=lengths, max_length=run.data.max_length)
        if plan is None:
            return (LabelCheck("labels", True, "no row with an answer to check on"),)
        unit = plan.unit
        (_, hidden), (_, labels) = await asyncio.gather(
            self._session.scorers.score(unit, HELD_OUT), self._session.scorers.score(unit, self._checked_encoding())
        )
        head, logits = await asyncio.to_thread(self._teacher_truth, unit)
        return check_labels(
            unit,
            hidden=await asyncio.to_thread(self._read_block, hidden),
            labels=await asyncio.to_thread(self._read_block, labels),
            teacher_head=head,
            dtype=self._teacher_dtype,
            reference_logits=logits,
            note=plan.note,
        )

    def _checked_encoding(self) -> Labels:
        """What is held against hidden states: the run's labels, or where those are hidden states some logits, so that
        the teacher's head as it is known here is held against the engine's."""
        if self._job.encoding.kind != HELD_OUT.kind:
            return self._job.encoding
        return TopK(k=min(64, self._job.inputs.vocabulary.size - 1))

    async def _prepare_evaluation(self) -> None:
        """Score held-out rows once, with hidden labels: evaluation is exact whatever the training encoding."""
        rows = self._job.evaluation
        if rows:
            world = self._session.students.world
            budget = max(self._job.loop.micro_batch_tokens, *(row.num_tokens for row in rows))
            plan = plan_step([row.num_tokens for row in rows], world=world, token_budget=budget)
            batches = cut_units(rows, plan, step=0, units_per_rank=plan.num_micro_batches)
            self._evaluation_units = [[_held_out(unit) for unit in batch.units] for batch in batches]
        await self._stage_evaluation()

    async def _stage_evaluation(self) -> None:
        """Score what is missing and hand every rank its held-out units; also after a restart of the group."""
        if not self._evaluation_units:
            return
        for _ in range(self._job.loop.max_unit_attempts):
            missing = [u for units in self._evaluation_units for u in units if u.id not in self._evaluation_blocks]
            scored = await asyncio.gather(*(self._session.scorers.score(unit, HELD_OUT) for unit in missing))
            self._evaluation_blocks.update((unit.id, block) for unit, (_, block) in zip(missing, scored, strict=True))
            blocks = [[self._evaluation_blocks[unit.id] for unit in units] for units in self._evaluation_units]
            try:
                await self._session.students.stage_evaluation(self._evaluation_units, blocks)
                return
            except LabelsLost as lost:
                for unit_id in lost.unit_ids:
                    del self._evaluation_blocks[unit_id]
        raise InfrastructureError(
            "the held-out labels were lost again and again while they were handed to the students"
        )

    async def _look(self, when: str, step: int) -> None:
        """Held-out quality and generations, before and after training."""
        if self._evaluation_units and not (when == "after" and self.final_evaluation is not None):
            evaluation = await self._session.students.evaluate(step)
            self._observer.evaluation(evaluation)
            self._refuse_broken(evaluation, trained=when == "after")
            self._on_evaluation(when, evaluation)
        elif self.final_evaluation is not None:
            self._on_evaluation(when, self.final_evaluation)
        report = self._job.run.report
        rows = self._job.evaluation[: report.generate]
        if rows:
            texts = await self._session.students.generate(
                [prompt_of(row) for row in rows],
                max_new_tokens=report.generate_tokens,
                stop_ids=self._job.inputs.stop_ids,
            )
            self._on_generation(when, rows, texts)

    def _refuse_broken(self, evaluation: Evaluation, *, trained: bool) -> None:
        if math.isfinite(evaluation.forward_kl):
            return
        if trained:
            raise Diverged(
                f"the held-out KL of the student as it was saved after step {evaluation.step} is "
                f"{evaluation.forward_kl}: it is broken, and not exported. Without that checkpoint in "
                f"{self._job.folder.checkpoints} the same command goes on from the one before, if there is one. Lower "
                "optimizer.learning_rate, in a run of another name"
            )
        raise ConfigError(
            f"the held-out KL is {evaluation.forward_kl} before the first step (perplexity of the student "
            f"{evaluation.perplexity}, of the teacher {evaluation.teacher_perplexity}): the weights of "
            "student.model or teacher.model hold NaN or infinity, or overflow in their dtype; name others, or another "
            "dtype"
        )

    async def _ask_teacher(self) -> None:
        """The teacher's own answers to the prompts of the report, by its writers where there are any. A run does not
        depend on them: what stands in their way is noted."""
        rows = self._job.evaluation[: self._job.run.report.generate]
        if not rows:
            return
        try:
            if self._session.writers is not None:
                asked = [Prompt(f"report/{row.id}", prompt_of(row), None, "data.evaluation") for row in rows]
                texts: list[np.ndarray] | None = await self._session.writers.write(asked)
            else:
                texts = await in_thread(self._teacher_answers, [prompt_of(row) for row in rows])
        except StillhouseError as error:
            self._observer.event("note", text=f"the report shows no answers of the teacher: {error}")
            return
        if texts is not None:
            self._on_generation("teacher", rows, texts)

    async def _train(self, step: int) -> None:
        """The loops and what follows them, from the last committed checkpoint again whenever the student group is lost.
        After the last step that is the one of this step: then only what follows is done again."""
        start = self._job.stream.cursor
        setbacks = Setbacks(step)
        while True:
            loops = Loops(
                stream=self._job.stream,
                elicitation=self._job.bind_elicitation(self._session.writers),
                scorers=self._session.scorers,
                students=self._session.students,
                encoding=self._job.encoding,
                settings=self._job.loop,
                observer=self._observer,
                save=self._save,
                stop_requested=self._stop_requested,
                non_finite_steps=self.non_finite_steps,
            )
            try:
                self.in_loops = True
                await loops.run(step)
                self.in_loops = False
                self.final_evaluation = loops.last_evaluation or self.final_evaluation
                await self._conclude()
                return
            except StudentsLost as error:
                lost = error
            finally:
                self.in_loops = False
            at_step = min(loops.last_step + 1, self._job.loop.total_steps)
            setbacks.add(from_step=step, last_step=loops.last_step, last_saved=loops.last_saved)
            step = await self._recover(lost, setbacks, at_step=at_step, start=start)

    async def _conclude(self) -> None:
        self._on_phase("generating after training, exporting the student")
        await self._look("after", self._job.loop.total_steps)
        try:
            await self._session.students.export(self._job.folder.student)
        except Diverged as error:
            raise Diverged(
                f"{error}. The checkpoint of step {self._job.loop.total_steps} in {self._job.folder.checkpoints} holds "
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
        await self._stage_evaluation()
        step = committed.state.step if committed else 0
        self.non_finite_steps = committed.state.non_finite_steps if committed else 0
        self._job.stream.seek(committed.state.cursor if committed else start)
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

    async def _save(self, step: int, cursor: Cursor, non_finite_steps: int) -> bool:
        """Returns whether the checkpoint exists now. One that cannot be made is noted and training goes on; three in a
        row end the run. A rank that fails while it writes loses the group: its peers wait for it in a collective."""
        state = TrainingState(
            step=step,
            cursor=cursor,
            config_hash=self._job.config_hash,
            world=self._session.students.world,
            non_finite_steps=non_finite_steps,
            total_steps=self._job.loop.total_steps,
            contents=dict(self._job.contents),
        )
        temporary = None
        try:
            temporary = await in_thread(self._checkpoints.begin, step)
            await self._session.students.save(step, temporary)
            await in_thread(self._checkpoints.commit, temporary, state)
            self._failed_saves = 0
            self._observer.event("checkpoint", at_step=step)
            return True
        except (OSError, InfrastructureError) as error:
            if isinstance(error, StudentsLost):
                raise
            if temporary is not None:
                await in_thread(self._checkpoints.discard, temporary)
            self._failed_saves += 1
            self._observer.event("save_failed", at_step=step, error=str(error), in_a_row=self._failed_saves)
            last = step == self._job.loop.total_steps
            if last or self._failed_saves >= MAX_FAILED_SAVES:
                raise InfrastructureError(f"the checkpoint of step {step} could not be written: {error}") from None
            return False


def _held_out(unit: Unit) -> Unit:
    return Unit(id=f"held-out/{unit.id}", sequences=unit.sequences)
