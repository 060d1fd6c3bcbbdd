"""What the tasks of a run are trained by, on one rank: encodings of their labels, objectives and their schedules.

`StudentRank` runs the model and asks here what a micro-batch's rows are compared by, and what the sums of a step mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from configs.alignment import ALIGNMENTS
from configs.held_out import held_out_sets
from configs.schema import Run
from configs.tasks import ResolvedTask
from trainer.checks.label_rows import PartLabels
from trainer.labels.encoding import Encoding, load_encoding
from trainer.loop.staging import StagedStep, Staging
from trainer.loop.together import Judged, judged_of, names_of
from trainer.losses.compiled import CompiledRows
from trainer.losses.ensemble import Mix, Together, mix_of
from trainer.losses.fused import LossPart
from trainer.losses.objective import Objective
from trainer.losses.token_weights import positions_of
from trainer.model.rollout_columns import Columns, columns_of_step
from trainer.types import BatchPart, TaskTotals


class TaskLosses:
    """Of all tasks, by name."""

    def __init__(self, run: Run, staging: Staging, *, world: int, total_steps: int) -> None:
        """`staging` holds the heads of teachers, and the ids that vocabularies share."""
        self._run, self._staging = run, staging
        self._world, self._total_steps = world, total_steps
        self.tasks = run.resolved_tasks()
        self.encodings = {name: _encoding_of(task) for name, task in self.tasks.items()}
        self._aligned = {name: self._aligned_encodings(task) for name, task in self.tasks.items()}
        self._objectives: dict[str, Objective] = {}
        self.compiled: dict[str, CompiledRows] = {}

    def build(self, *, padded: bool, compiled: bool) -> None:
        """Make the objectives. `padded`: the student has rows beyond the vocabulary; `compiled`: on this device their
        element-wise part is, unless the run says no."""
        self._objectives = {
            name: Objective.of(
                task.objective,
                self.encodings[name],
                padded=padded,
                teachers=task.teachers if task.ensemble is not None and task.ensemble.how == "per_teacher" else (),
            )
            for name, task in self.tasks.items()
        }
        if compiled and self._run.student.compile_loss:
            made = {name: CompiledRows.of(objective) for name, objective in self._objectives.items()}
            self.compiled = {name: rows for name, rows in made.items() if rows is not None}

    def judged(self, staged: StagedStep) -> dict[tuple[str, str], Judged]:
        """What each of several teachers said of this rank's rows of a step."""
        ensembles = {name: task.ensemble for name, task in self.tasks.items() if task.ensemble is not None}
        return judged_of(staged.micro_batches, ensembles)

    @property
    def term_names(self) -> list[tuple[str, str]]:
        """(task, term), in the order in which terms are summed."""
        of_head = [(task, name) for task, objective in self._objectives.items() for name in objective.names]
        return of_head + [(task, name) for task, one in self._objectives.items() for name in one.feature_names]

    def means(
        self, sums: list[float], staged: StagedStep, judged: Mapping[tuple[str, str], Judged]
    ) -> dict[str, float]:
        """Each bare term over what its task has of it: loss tokens (those that its teacher judged, where each has terms
        of its own), or groups. NaN where there are none: a mean of nothing is no zero."""
        means = {}
        for (task, name), value in zip(self.term_names, sums, strict=True):
            totals = staged.totals.get(task, TaskTotals(0, 0))
            of_groups = name in self._objectives[task].sequence_names
            count = totals.num_groups if of_groups else totals.num_loss_tokens
            if "/" in name:
                count = judged[task, name.partition("/")[2]].rows
            means[f"{self._area(task)}/{name}"] = value / count if count else math.nan
        return means

    def _area(self, task: str) -> str:
        """Of the task's metrics."""
        return "train" if len(self.tasks) == 1 else f"task/{task}"

    def told(self) -> dict[str, float]:
        return {
            f"{self._area(task)}/{name}": value
            for task, objective in self._objectives.items()
            for name, value in objective.told().items()
        }

    def advance(self, means: dict[str, float], step: int) -> None:
        """By means that are equal on all ranks; those of tasks without a row in this step stand still."""
        for task, objective in self._objectives.items():
            own = {name: means[f"{self._area(task)}/{name}"] for name in objective.row_names}
            if not any(math.isnan(value) for value in own.values()):
                objective.advance(own, step / max(1, self._total_steps))

    def columns(self, staged: StagedStep, device: torch.device) -> list[list[Columns]]:
        """Collective where an objective compares answers of a step that the student wrote: of each micro-batch and part
        the columns for `part`."""
        if not any(objective.returns for objective in self._objectives.values()):
            return [[part.columns for part in batch.parts] for batch in staged.micro_batches]
        return columns_of_step(
            staged.micro_batches,
            self._objectives,
            lambda part: self.part(part, staged, {}),
            device=device,
            vocabulary_size=self._staging.vocabulary_size,
            chunk_rows=self._run.student.loss_chunk_rows,
        )

    def part(self, part: BatchPart, staged: StagedStep, columns: Columns) -> LossPart:
        """Row terms are divided by the loss tokens of the step (or of the task in it), sequence terms by the groups of
        the task in the step; times the number of ranks, because DeepSpeed averages over them."""
        task, totals = self.tasks[part.task], staged.totals[part.task]
        return LossPart(
            rows=part.rows,
            labels=part.labels,
            encoding=self._part_encoding(part),
            objective=self._objectives[part.task],
            scale=self.row_scale(part, staged),
            teacher_head=self._staging.teacher_head(part.teacher),
            row_weights=part.row_weights,
            positions=positions_of(part.row_sequences),
            group_scale=self._world / max(1, totals.num_groups) * task.weight,
            row_sequences=part.row_sequences,
            groups=part.groups,
            rewards=part.rewards,
            compiled=self.compiled.get(part.task),
            columns=_on_device(columns, part) if self._objectives[part.task].on_rollouts else {},
        )

    def row_scale(self, part: BatchPart, staged: StagedStep) -> float:
        """What a row term's sum over the part is multiplied by."""
        task, totals = self.tasks[part.task], staged.totals[part.task]
        tokens = totals.num_loss_tokens if task.normaliser == "task" else staged.num_loss_tokens
        return self._world / max(1, tokens) * task.weight

    def _part_encoding(self, part: BatchPart) -> Encoding | Together | None:
        """Of the labels of a part; those of several teachers know their heads."""
        encoding, ensemble = self.encodings[part.task], self.tasks[part.task].ensemble
        if encoding is None or ensemble is None or ensemble.how == "min_ce":
            return next(iter(self._aligned[part.task].values()), encoding)
        names = names_of(part.teacher)
        heads = {name: self._staging.teacher_head(name) for name in names}
        return Together(encoding, tuple(names), ensemble.how, heads, self._aligned[part.task])

    def _tested(self, task: str) -> Encoding | Together | None:
        """By what the loss of a task is computed in the self-test."""
        encoding, ensemble = self.encodings[task], self.tasks[task].ensemble
        if encoding is None or ensemble is None or ensemble.how == "min_ce":
            return encoding
        return Together(encoding, ensemble.teachers, ensemble.how)

    def _aligned_encodings(self, task: ResolvedTask) -> dict[str, Encoding]:
        """Of an aligned task by teacher: the encoding over what both vocabularies have in common; of a mixture over
        what all have."""
        encoding = self.encodings[task.name]
        if encoding is None or task.align is None:
            return {}
        shared = {name: self._staging.shared_ids(name) for name in task.teachers}
        if task.ensemble is not None and task.ensemble.how != "per_teacher":
            shared = dict(self._staging.common_ids(task.ensemble.asked))
        method = ALIGNMENTS.load(task.align)
        return {name: method.encoding(encoding, ids) for name, ids in shared.items() if ids is not None}

    def part_labels(self, part: BatchPart) -> PartLabels | None:
        """By what the labels of a part are shown: as its teacher made them, whatever the alignment."""
        task, encoding = self.tasks[part.task], self._part_encoding(part)
        if encoding is None or task.align is None:
            return None if encoding is None else PartLabels(encoding, self._staging.teacher_head(part.teacher))
        if isinstance(encoding, Together):
            return PartLabels(encoding, None, how=task.align.kind)
        own, how = self.encodings[part.task], task.align.kind
        return PartLabels(
            own,
            self._staging.teacher_head(part.teacher),
            shared=self._staging.shared_ids(part.teacher),
            aligned=encoding if how == "overlap" else None,
            how=how,
        )

    def mixes(self) -> dict[str, Mix]:
        """How teachers that score held-out rows together become one, by set of rows."""
        ensembles = {name: one.task.ensemble for name, one in held_out_sets(self._run).items()}
        return {name: mix_of(one.how) for name, one in ensembles.items() if one is not None}

    def tested(self) -> dict[str, tuple[Encoding | Together | None, Objective]]:
        """By what the self-test computes the loss of each task."""
        return {name: (self._tested(name), objective) for name, objective in self._objectives.items()}

    def state(self) -> dict[str, Any]:
        """The numbers of all schedules, for a checkpoint."""
        return {
            task: {name: dict(schedule.numbers) for name, schedule in objective.schedules.items()}
            for task, objective in self._objectives.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for task, objective in self._objectives.items():
            for name, schedule in objective.schedules.items():
                schedule.numbers = dict(state[task][name])


def _on_device(columns: Columns, part: BatchPart) -> Columns:
    """Of one part; those of a whole step wait in host memory."""
    return {name: column.to(part.row_sequences.device) for name, column in columns.items()}


def _encoding_of(task: ResolvedTask) -> Encoding | None:
    return None if task.trained_labels is None else load_encoding(task.trained_labels)
