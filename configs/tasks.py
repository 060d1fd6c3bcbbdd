"""Tasks: one choice at each station, and which teacher is asked. A run has one at the top level, or several by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from configs.alignment import Alignment, AnyAlignment
from configs.answers import Answers, AnyAnswers
from configs.labels import AnyLabels, GivenIds, Labels, NoLabels, TopK
from configs.losses import AnyTerm, Term
from configs.prompts import Dataset, HeldOutRows
from configs.refusal import refusal
from configs.rewards import AnyReward, Reward
from configs.section import MAIN, NAME, TOGETHER, Section, Weight

if TYPE_CHECKING:
    from configs.schema import Run

Name = Annotated[str, Field(pattern=NAME)]


class Route(Section):
    """Which teacher is asked about a row, by a column of the row."""

    column: str = Field(min_length=1, description="A field of every row.")
    map: dict[str, Name] = Field(
        min_length=1, description="Value of the column -> name of a teacher; a row with another value is a bad row."
    )


How = Literal["probability_mean", "logit_mean", "per_teacher", "min_ce"]


class Ensemble(Section):
    """Several teachers that are asked about the same tokens, and what is made of what they say."""

    teachers: tuple[Name, ...] = Field(description="Names of at least two.")
    how: How = Field(
        "probability_mean",
        description="probability_mean: their mixture; logit_mean: their geometric mean, renormalised; per_teacher: "
        "terms of its own for each; min_ce: of each sequence the one with the lowest cross-entropy on its target ids.",
    )
    weights: dict[Name, Weight] = Field(
        {}, description="Of each teacher, relative to the others; none given: equal. They are divided by their sum."
    )
    weights_column: str | None = Field(
        None, min_length=1, description="Instead of weights: a field of every row that holds its own, {name: number}."
    )
    on_lost: Literal["end", "continue"] = Field(
        "end",
        description="When a teacher is lost for good: end the run, or go on with the rest, by their own weights. What "
        "it did not judge is counted.",
    )

    @field_validator("teachers")
    @classmethod
    def _at_least_two(cls, teachers: tuple[str, ...]) -> tuple[str, ...]:
        for index, name in enumerate(teachers):
            if name in teachers[:index]:
                text = f"{name} is named twice: name it once, and give it more weight with weights: {{{name}: 2, ...}}"
                raise refusal((index,), name, text)
        if len(teachers) < 2:
            alone = teachers[0] if teachers else "NAME"
            raise ValueError(f"an ensemble is of at least two teachers: for one, write teacher: {alone}, no ensemble")
        return teachers

    @model_validator(mode="after")
    def _weights_are_of_its_teachers(self) -> Ensemble:
        names, written = ", ".join(self.teachers), ", ".join(f"{name}: 1" for name in self.teachers)
        if self.weights_column is not None and self.weights:
            raise refusal(("weights_column",), self.weights_column, "weights are given too: keep one of the two")
        given = "weights" if self.weights else "weights_column" if self.weights_column is not None else None
        if self.how == "min_ce" and given:
            text = f"how: min_ce takes one teacher for each sequence: remove {given}, or write how: probability_mean"
            raise refusal((given,), None, text)
        for name in self.weights:
            if name not in self.teachers:
                raise refusal(
                    ("weights", name), self.weights[name], f"is no teacher of the ensemble ({names}): remove it"
                )
        if self.weights and (missing := [name for name in self.teachers if name not in self.weights]):
            text = f"{missing[0]} has no weight: give one to each, weights: {{{written}}}, or to none"
            raise refusal(("weights",), None, text)
        return self

    @property
    def asked(self) -> str:
        """The names of its teachers in one word, as rows and units carry it."""
        return TOGETHER.join(self.teachers)


class Task(Section):
    """What is not said here comes from the top level."""

    prompts: Dataset | None = Field(None, description="The rows to train on.")
    answers: AnyAnswers | None = Field(None, description="Who writes the text that is trained on.")
    evaluation: HeldOutRows | None = Field(None, description="Held-out rows of the task; None: data.evaluation.")
    labels: AnyLabels | None = Field(None, description="What the teacher says of each token.")
    reward: AnyReward | None = Field(None, description="What a function says of each answer, for terms that raise it.")
    align: AnyAlignment | None = Field(None, description="How labels of a teacher with another tokenizer are used.")
    objective: tuple[AnyTerm, ...] | None = Field(None, min_length=1, description="Weighted terms of the loss.")
    teacher: Name | None = Field(
        None, description="Its name; None: the only teacher, or as `route` or `ensemble` says."
    )
    route: Route | None = Field(None, description="Instead of teacher: by a column of each row.")
    ensemble: Ensemble | None = Field(None, description="Instead of teacher: several about the same tokens.")
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
    teacher: str | None  # None: `route` or `ensemble` says, or nobody is asked
    route: Route | None
    ensemble: Ensemble | None = None
    weight: float = 1.0
    share: float = 1.0
    normaliser: Literal["run", "task"] = "run"
    evaluation: HeldOutRows | None = None
    align: Alignment | None = None
    reward: Reward | None = None

    @property
    def fraction(self) -> float | None:
        """Of its rows that is held out, if any is."""
        return None if self.evaluation is None else self.evaluation.fraction

    @property
    def soft_labels(self) -> Labels | None:
        """What a teacher says of each token; None where it is not asked."""
        return None if isinstance(self.labels, NoLabels) else self.labels

    @property
    def joins_ids(self) -> bool:
        """Whether teachers are asked twice: for the ids that each would keep, then about those that any of them did."""
        return self.ensemble is not None and self.ensemble.how == "probability_mean" and isinstance(self.labels, TopK)

    @property
    def has_shared_ids(self) -> bool:
        """Whether the labels of all teachers are of the same ids, so that a mixture is one of them."""
        labels = self.soft_labels
        given = isinstance(labels, GivenIds) and not labels.add_teacher_topk
        return labels is not None and (labels.of_every_id or self.joins_ids or given)

    @property
    def trained_labels(self) -> Labels | None:
        """What comes to the students: `soft_labels`, or what their second request makes of them."""
        if self.joins_ids:
            joined = self.labels.k * len(self.teachers)
            return GivenIds(k=joined, ids="teachers", add_target=False, temperature=self.labels.temperature)
        return self.soft_labels

    @property
    def asks(self) -> bool:
        """Whether a teacher is asked at all, for labels or for answers."""
        return self.soft_labels is not None or self.answers.needs_generator

    @property
    def compares_answers(self) -> bool:
        """Whether a term of the objective needs several answers to each prompt."""
        return any(term.compares_answers for term in self.objective)

    @property
    def compared_rows(self) -> str:
        """The format of rows whose answers are compared; empty where none are."""
        return next((term.compared_rows for term in self.objective if term.compares_answers), "")

    @property
    def learns_scores(self) -> bool:
        """Whether every answer needs a score."""
        return any("rewards" in term.needs for term in self.objective)

    @property
    def learns_rollouts(self) -> bool:
        """Whether a term learns from the sampled tokens of text that the student wrote."""
        return any("rollouts" in term.needs for term in self.objective)

    @property
    def raises_rewards(self) -> bool:
        """Whether such a term raises the rewards that a verifier gave."""
        return any(getattr(term, "reward_weight", 0.0) > 0 for term in self.objective)

    @property
    def has_reference(self) -> bool:
        """Whether the teacher is what the student moves away from, and not what it learns."""
        return self.compared_rows == "preference"

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of all teachers that are asked."""
        if not self.asks:
            return ()
        if self.ensemble is not None:
            return self.ensemble.teachers
        routed = () if self.route is None else tuple(dict.fromkeys(self.route.map.values()))
        return routed if self.teacher is None else (self.teacher,)


def resolve_tasks(run: Run) -> Mapping[str, ResolvedTask]:
    """The tasks of a run by name, in the order of the configuration."""
    known = tuple(run.named_teachers())
    only = known[0] if len(known) == 1 else None
    resolved = {}
    for name, task in (run.tasks or {MAIN: Task()}).items():
        says = task.teacher is not None or task.route is not None or task.ensemble is not None
        route, ensemble = (task.route, task.ensemble) if says else (run.route, run.ensemble)
        resolved[name] = ResolvedTask(
            name=name,
            prompts=task.prompts or run.prompts,
            answers=task.answers or run.answers,
            labels=task.labels or run.labels,
            objective=task.objective or run.objective,
            teacher=task.teacher or (only if route is None and ensemble is None else None),
            route=route,
            ensemble=ensemble,
            weight=task.weight,
            share=task.share,
            normaliser=task.normaliser,
            evaluation=task.evaluation or run.data.evaluation,
            align=task.align or run.align,
            reward=task.reward or run.reward,
        )
    return resolved
