"""The held-out rows of a run: their labels, the quality of the student on them, and what the models write to them."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING

import numpy as np

from configs.held_out import held_out_sets
from configs.labels import HELD_OUT
from trainer.data.readable import prompt_of
from trainer.errors import ConfigError, Diverged, StillhouseError
from trainer.loop.plan import cut_units, plan_step
from trainer.loop.scoring import Scored, score_and_stage, scorer_of
from trainer.loop.together import names_of
from trainer.model.teacher_answers import teacher_answers
from trainer.protocols import Moment, Observer, Session
from trainer.threads import in_thread
from trainer.types import Evaluation, GenerationRequest, Sampling, Sequence, Unit

if TYPE_CHECKING:
    from trainer.loop.inputs import TaskInputs
    from trainer.loop.job import Job


class HeldOut:
    """Keeps the units and their blocks over restarts of the student group."""

    def __init__(self, job: Job, session: Session, observer: Observer) -> None:
        self._job = job
        self._teachers = session.teachers
        self._students = session.students
        self._observer = observer
        self._units: list[list[Unit]] = []  # by rank
        self._scored: dict[str, Scored] = {}
        self._sets = held_out_sets(job.run)

    async def prepare(self) -> None:
        """Score the rows once, with hidden labels: evaluation is exact whatever the training encoding."""
        rows = self._job.evaluation
        if unscored := [name for name, one in self._sets.items() if not one.is_scored]:
            of = "" if len(self._sets) == 1 else f" of {', '.join(unscored)}"
            text = f"held-out rows{of} have no teacher's labels: perplexity is measured on them, KL and agreement not"
            self._observer.event("note", text=text)
        if rows:
            budget = max(self._job.loop.micro_batch_tokens, *(row.num_tokens for row in rows))
            plan = plan_step([row.num_tokens for row in rows], world=self._students.world, token_budget=budget)
            batches = cut_units(rows, plan, step=0, units_per_rank=plan.num_micro_batches)
            self._units = [[_held_out(unit) for unit in batch.units] for batch in batches]
        await self.stage()

    async def stage(self) -> None:
        """Score what is missing and hand every rank its held-out units; also after a restart of the group."""
        if not self._units:
            return
        asked = [[one for unit in of_rank for one in unit.asked()] for of_rank in self._units]
        units = [one for of_rank in asked for one in of_rank if self._sets[one.kind[0]].is_scored]

        async def stage() -> None:
            found = {unit_id: scored[1] for unit_id, scored in self._scored.items()}
            await self._students.stage_evaluation(
                self._units, [[found.get(one.id) for one in of_rank] for of_rank in asked]
            )

        await score_and_stage(
            "the held-out rows",
            units,
            self._scored,
            score=self._score,
            stage=stage,
            attempts=self._job.loop.max_unit_attempts,
            observer=self._observer,
        )

    async def _score(self, unit: Unit) -> Scored:
        return await scorer_of(self._teachers, unit.kind[1]).score(unit.as_read(), HELD_OUT)

    @property
    def _report_rows(self) -> tuple[Sequence, ...]:
        """What the models are asked for the report: the first rows of the first set."""
        rows = self._job.evaluation
        return tuple(row for row in rows if row.task == rows[0].task)[: self._job.run.report.generate]

    async def look(self, when: Moment, step: int, *, evaluated: bool = False) -> None:
        """Quality and generations before and after training; `evaluated`: the loops did the former."""
        if self._units and not evaluated:
            evaluation = await self._students.evaluate(step)
            self._observer.evaluation(evaluation, when)
            self._refuse_broken(evaluation, trained=when == "after")
        if rows := self._report_rows:
            texts = await self._students.generate(
                [prompt_of(row) for row in rows],
                max_new_tokens=self._job.run.report.generate_tokens,
                stop_ids=self._inputs.stop_ids,
            )
            self._observer.generation(when, rows, texts)

    def _refuse_broken(self, evaluation: Evaluation, *, trained: bool) -> None:
        if evaluation.is_finite:
            return
        what, value = evaluation.headline
        if trained:
            raise Diverged(
                f"the held-out {what} of the student as it was saved after step {evaluation.step} is "
                f"{value}: it is broken, and not exported. Without that checkpoint in "
                f"{self._job.folder.checkpoints} the same command goes on from the one before, if there is one. Lower "
                "optimizer.learning_rate, in a run of another name"
            )
        compared, models = "", "student.model"
        if evaluation.teacher_perplexity is not None:
            compared = f" (perplexity of the student {evaluation.perplexity}, of the teacher "
            compared, models = f"{compared}{evaluation.teacher_perplexity})", "student.model or of a teacher's model"
        raise ConfigError(
            f"the held-out {what} is {value} before the first step{compared}: the weights of {models} hold NaN or "
            "infinity, or overflow in their dtype; name others, or another dtype"
        )

    async def ask_teacher(self) -> None:
        """The teacher's own answers to the prompts of the report, by its generator where there is one. A run does not
        depend on them: what stands in their way is noted."""
        rows = self._report_rows
        asked = self._sets[rows[0].task].task.teachers if rows else ()
        store = self._job.run.store
        if not asked or (store is not None and store.mode == "only"):
            return
        try:
            texts = await self._written(rows, names_of(rows[0].teacher)[0] or asked[0])
        except StillhouseError as error:
            self._observer.event("note", text=f"the report shows no answers of the teacher: {error}")
            return
        if texts is not None:
            if (aligner := self._inputs.aligner) is not None:
                texts = [np.asarray(aligner.translated(text), dtype=np.int32) for text in texts]
            self._observer.generation("teacher", rows, texts)

    async def _written(self, rows: AbstractSequence[Sequence], name: str) -> list[np.ndarray] | None:
        """By one teacher, also where the rows are of several."""
        prompts, stop_ids = [prompt_of(row.as_read(name)) for row in rows], self._inputs.stop_ids_of(name)
        if (generator := self._teachers[name].generator) is not None:
            greedy = Sampling(self._job.run.report.generate_tokens, stop_token_ids=stop_ids)
            asked = [
                GenerationRequest(f"report/{row.id}", prompt, greedy, origin="data.evaluation")
                for row, prompt in zip(rows, prompts, strict=True)
            ]
            return [completion.token_ids for completion in await generator.generate(asked)]
        return await in_thread(
            teacher_answers,
            prompts,
            self._job.run.teachers_by_name()[name].model,
            max_new_tokens=self._job.run.report.generate_tokens,
            stop_ids=stop_ids,
        )

    @property
    def _inputs(self) -> TaskInputs:
        """By which the rows of the report are read."""
        return self._job.inputs.tasks[self._sets[self._report_rows[0].task].task.name]


def _held_out(unit: Unit) -> Unit:
    return Unit(id=f"held-out/{unit.id}", sequences=unit.sequences)
