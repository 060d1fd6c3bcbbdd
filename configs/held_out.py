"""Held-out rows: which tasks are evaluated on them, and which teacher scores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.prompts import Dataset
from configs.tasks import ResolvedTask

if TYPE_CHECKING:
    from configs.schema import Run


@dataclass(frozen=True, slots=True)
class HeldOutSet:
    """Held-out rows of the tasks that have them and the teacher in common, so that they are read and scored once."""

    tasks: tuple[ResolvedTask, ...]
    rows: Dataset
    fraction: float | None = None
    """Of these rows, which the tasks train on otherwise; None: all."""

    @property
    def name(self) -> str:
        """`chat`, or `chat+code` of two tasks."""
        return "+".join(task.name for task in self.tasks)

    @property
    def task(self) -> ResolvedTask:
        """By whose template, teacher and route the rows are read: the first that takes labels, or the first."""
        return next((task for task in self.tasks if task.soft_labels is not None), self.tasks[0])

    @property
    def is_scored(self) -> bool:
        """Whether a teacher scores the rows; otherwise the student's perplexity is all that is measured."""
        return self.task.soft_labels is not None


def held_out_sets(run: Run) -> Mapping[str, HeldOutSet]:
    """By name, in the order of the tasks; none where the run has no held-out rows."""
    members: dict[tuple[str, ...], list[ResolvedTask]] = {}
    for task in run.resolved_tasks().values():
        if task.evaluation is not None:
            route = (task.route or task.ensemble).model_dump_json() if task.route or task.ensemble else ""
            source = "" if task.fraction is None else task.prompts.model_dump_json()
            aligned = "" if task.align is None else "aligned"
            key = (task.evaluation.model_dump_json(), source, route, aligned, *task.teachers)
            members.setdefault(key, []).append(task)
    return {one.name: one for one in (_set_of(tasks) for tasks in members.values())}


def _set_of(tasks: list[ResolvedTask]) -> HeldOutSet:
    evaluation = tasks[0].evaluation
    assert evaluation is not None
    rows = evaluation if evaluation.fraction is None else tasks[0].prompts
    return HeldOutSet(tuple(tasks), rows, evaluation.fraction)
