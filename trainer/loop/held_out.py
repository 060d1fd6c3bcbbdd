"""The held-out rows of a run: their labels, the quality of the student on them, and what the models write to them."""

from __future__ import annotations

import asyncio
import math

import numpy as np

from configs.labels import HELD_OUT
from trainer.data.readable import prompt_of
from trainer.errors import ConfigError, Diverged, InfrastructureError, LabelsLost, StillhouseError
from trainer.loop.job import Job, evaluating_task
from trainer.loop.plan import cut_units, plan_step
from trainer.loop.scoring import scorer_of
from trainer.model.teacher_answers import teacher_answers
from trainer.protocols import Moment, Observer, Session
from trainer.threads import in_thread
from trainer.types import BlockRef, Evaluation, GenerationRequest, Sampling, Unit, UnitReport


class HeldOut:
    """Keeps the units and their blocks over restarts of the student group."""

    def __init__(self, job: Job, session: Session, observer: Observer) -> None:
        self._job = job
        self._teachers = session.teachers
        self._students = session.students
        self._observer = observer
        self._units: list[list[Unit]] = []  # by rank
        self._blocks: dict[str, BlockRef] = {}

    async def prepare(self) -> None:
        """Score the rows once, with hidden labels: evaluation is exact whatever the training encoding."""
        rows = self._job.evaluation
        if rows and not self._job.loop.has_held_out_rows:
            text = "no task takes labels of a teacher, so there is no held-out KL: data.evaluation is only answered"
            self._observer.event("note", text=text)
        elif rows:
            budget = max(self._job.loop.micro_batch_tokens, *(row.num_tokens for row in rows))
            plan = plan_step([row.num_tokens for row in rows], world=self._students.world, token_budget=budget)
            batches = cut_units(rows, plan, step=0, units_per_rank=plan.num_micro_batches)
            self._units = [[_held_out(unit) for unit in batch.units] for batch in batches]
        await self.stage()

    async def stage(self) -> None:
        """Score what is missing and hand every rank its held-out units; also after a restart of the group."""
        if not self._units:
            return
        for _ in range(self._job.loop.max_unit_attempts):
            missing = [unit for units in self._units for unit in units if unit.id not in self._blocks]
            scored = await asyncio.gather(*(self._score(unit) for unit in missing))
            self._blocks.update((unit.id, block) for unit, (_, block) in zip(missing, scored, strict=True))
            blocks = [[self._blocks[unit.id] for unit in units] for units in self._units]
            try:
                await self._students.stage_evaluation(self._units, blocks)
                return
            except LabelsLost as lost:
                for unit_id in lost.unit_ids:
                    del self._blocks[unit_id]
        raise InfrastructureError(
            "the held-out labels were lost again and again while they were handed to the students"
        )

    async def _score(self, unit: Unit) -> tuple[UnitReport, BlockRef]:
        return await scorer_of(self._teachers, unit.kind[1]).score(unit, HELD_OUT)

    async def look(self, when: Moment, step: int, *, evaluated: bool = False) -> None:
        """Quality and generations before and after training; `evaluated`: the loops did the former."""
        if self._units and not evaluated:
            evaluation = await self._students.evaluate(step)
            self._observer.evaluation(evaluation, when)
            self._refuse_broken(evaluation, trained=when == "after")
        report = self._job.run.report
        rows = self._job.evaluation[: report.generate]
        if rows:
            texts = await self._students.generate(
                [prompt_of(row) for row in rows],
                max_new_tokens=report.generate_tokens,
                stop_ids=self._job.inputs.stop_ids,
            )
            self._observer.generation(when, rows, texts)

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

    async def ask_teacher(self) -> None:
        """The teacher's own answers to the prompts of the report, by its generator where there is one. A run does not
        depend on them: what stands in their way is noted."""
        rows = self._job.evaluation[: self._job.run.report.generate]
        if not rows or not self._teachers:
            return
        prompts = [prompt_of(row) for row in rows]
        try:
            texts = await self._written(prompts, [f"report/{row.id}" for row in rows])
        except StillhouseError as error:
            self._observer.event("note", text=f"the report shows no answers of the teacher: {error}")
            return
        if texts is not None:
            self._observer.generation("teacher", rows, texts)

    async def _written(self, prompts: list[np.ndarray], ids: list[str]) -> list[np.ndarray] | None:
        task = evaluating_task(self._job.run)
        name = task.teachers[0]  # of a route one teacher, for all prompts
        if (generator := self._teachers[name].generator) is not None:
            greedy = Sampling(
                self._job.run.report.generate_tokens, stop_token_ids=self._job.inputs.tasks[task.name].stop_ids
            )
            asked = [
                GenerationRequest(one, prompt, greedy, origin="data.evaluation")
                for one, prompt in zip(ids, prompts, strict=True)
            ]
            return [completion.token_ids for completion in await generator.generate(asked)]
        return await in_thread(
            teacher_answers,
            prompts,
            self._job.run.teachers_by_name()[name].model,
            max_new_tokens=self._job.run.report.generate_tokens,
            stop_ids=self._job.inputs.stop_ids,
        )


def _held_out(unit: Unit) -> Unit:
    return Unit(id=f"held-out/{unit.id}", sequences=unit.sequences)
