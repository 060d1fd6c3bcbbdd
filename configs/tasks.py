"""Tasks: one choice at each station, and which teacher is asked. A run has one at the top level, or several by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from configs.answers import Answers, AnyAnswers
from configs.labels import AnyLabels, Labels, NoLabels
from configs.losses import AnyTerm, Term
from configs.prompts import Dataset, HeldOutRows
from configs.section import MAIN, NAME, Section, Weight

if TYPE_CHECKING:
    from configs.schema import Run

Name = Annotated[str, Field(pattern=NAME)]


class Route(Section):
    """Which teacher is asked about a row, by a column of the row."""

    column: str = Field(min_length=1, description="A field of every row.")
    map: dict[str, Name] = Field(
        min_length=1, description="Value of the column -> name of a teacher; a row with another value is a bad row."
    )


class Task(Section):
    """What is not said here comes from the top level."""

    prompts: Dataset | None = Field(None, description="The rows to train on.")
    answers: AnyAnswers | None = Field(None, description="Who writes the text that is trained on.")
    evaluation: HeldOutRows | None = Field(None, description="Held-out rows of the task; None: data.evaluation.")
    labels: AnyLabels | None = Field(None, description="What the teacher says of each token.")
    objective: tuple[AnyTerm, ...] | None = Field(None, min_length=1, description="Weighted terms of the loss.")
    teacher: Name | None = Field(None, description="Its name; None: the only teacher, or as `route` says.")
    route: Route | None = Field(None, description="Instead of teacher: by a column of each row.")
    weight: Weight = Field(1.0, description="Of the task's loss in the sum.")
    share: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Of the sequences of a step; the shares of all tasks are its parts."
    )
    normaliser: Literal["run", "task"] = Field(
        "run", description="What a sum over loss tokens is divided by: those of the step, or those of the task in it."
    )


@dataclass(frozen=True, slots=True)
class ResolvedTask:
    """A task with every station filled in."""

    name: str
    prompts: Dataset
    answers: Answers
    labels: Labels | NoLabels
    objective: tuple[Term, ...]
    teacher: str | None  # None: `route` says, or nobody is asked
    route: Route | None
    weight: float = 1.0
    share: float = 1.0
    normaliser: Literal["run", "task"] = "run"
    evaluation: HeldOutRows | None = None

    @property
    def fraction(self) -> float | None:
        """Of its rows that is held out, if any is."""
        return None if self.evaluation is None else self.evaluation.fraction

    @property
    def soft_labels(self) -> Labels | None:
        """What a teacher says of each token; None where it is not asked."""
        return None if isinstance(self.labels, NoLabels) else self.labels

    @property
    def asks(self) -> bool:
        """Whether a teacher is asked at all, for labels or for answers."""
        return self.soft_labels is not None or self.answers.needs_generator

    @property
    def compares_answers(self) -> bool:
        """Whether a term of the objective needs several answers to each prompt."""
        return any(term.compares_answers for term in self.objective)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of all teachers that are asked."""
        if not self.asks:
            return ()
        routed = () if self.route is None else tuple(dict.fromkeys(self.route.map.values()))
        return routed if self.teacher is None else (self.teacher,)


def resolve_tasks(run: Run) -> Mapping[str, ResolvedTask]:
    """The tasks of a run by name, in the order of the configuration."""
    known = tuple(run.named_teachers())
    only = known[0] if len(known) == 1 else None
    resolved = {}
    for name, task in (run.tasks or {MAIN: Task()}).items():
        route = task.route or (run.route if task.teacher is None else None)
        resolved[name] = ResolvedTask(
            name=name,
            prompts=task.prompts or run.prompts,
            answers=task.answers or run.answers,
            labels=task.labels or run.labels,
            objective=task.objective or run.objective,
            teacher=task.teacher or (only if route is None else None),
            route=route,
            weight=task.weight,
            share=task.share,
            normaliser=task.normaliser,
            evaluation=task.evaluation or run.data.evaluation,
        )
    return resolved
