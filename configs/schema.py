"""The whole configuration as pydantic models: what a run is, its defaults, and the rules between fields.

A field that chooses a kind takes the parameters of that kind beside it (`configs/stations.py`). Nothing here is
adjusted silently: a rule that fails says what to write instead. A `None` that means "decided from the hardware" is
decided by `cluster/placement/resolve.py`, never here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, ValidationInfo, field_validator, model_validator

from configs.alignment import ALIGNMENTS, AnyAlignment
from configs.answers import ANSWERS, AnyAnswers, DatasetAnswers
from configs.engines import ENGINES
from configs.labels import LABELS, AnyLabels, Labels, NoLabels, TopK
from configs.losses import LOSSES, AnyTerm, ForwardKl
from configs.models import Rollouts, Student, Teacher
from configs.notify import Notify
from configs.paths import expand_home
from configs.prompts import Data, Dataset
from configs.refusal import refusal, refusals
from configs.rewards import REWARDS, AnyReward
from configs.rules import NO_TEACHER, broken_rules, place_of_teacher
from configs.section import MOST_SECONDS, NAME, Bytes, Natural, Positive, Seconds, Section
from configs.stations import Station
from configs.store import Store
from configs.tasks import Ensemble, Name, ResolvedTask, Route, Task, resolve_tasks
from configs.trackers import TRACKERS, AnyTracker, TrackerChoice


class Optimizer(Section):
    """AdamW (arXiv 1711.05101) and its schedule."""

    learning_rate: PositiveFloat = Field(1e-4, description="At its peak, after the warm-up.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="Decay of the running means of the gradient and of its square."
    )
    eps: PositiveFloat = Field(1e-8, description="Added to the root of the mean square.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Decoupled from the gradient, as AdamW has it."
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients of a larger norm are scaled down to it.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Of the learning rate from its peak to final_fraction of it."
    )
    warmup_steps: Natural = Field(0, description="Steps in which the learning rate rises from 0 to its peak.")
    final_fraction: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="Last learning rate over the peak.")


class Training(Section):
    """Steps, batches, and what happens every so many of them."""

    steps: Positive | None = Field(None, description="Optimizer steps; give this or epochs.")
    epochs: Positive | None = Field(None, description="Times that all rows are read; give this or steps.")
    sequences_per_step: Positive = Field(
        32, description="The global batch: rows of one optimizer step, over all ranks."
    )
    micro_batch_tokens: Positive = Field(4096, description="Token budget of one packed micro-batch of one rank.")
    depth: Natural = Field(2, description="Steps the teacher may run ahead of the student; 0: synchronous.")
    max_label_bytes: Bytes = Field(2 * 2**30, description="Labels made and not yet trained, over all ranks.")
    evaluate_every: Natural = Field(0, description="Steps between evaluations; 0: only before and after.")
    save_every: Natural = Field(0, description="Steps between checkpoints; 0: by time, and at the end.")
    save_every_minutes: Annotated[float, Field(ge=0, le=MOST_SECONDS / 60)] = Field(
        10, description="Save after the step at hand when the last checkpoint is so old; 0: by steps alone."
    )
    keep_checkpoints: Positive = Field(2, description="The newest ones; older ones are deleted.")
    on_changed_inputs: Literal["error", "note"] = Field(
        "error",
        description="A resumed run finds other rows, weights or tokenizer files than it began with; note: goes on with "
        "them, and says so.",
    )
    max_non_finite_steps: Natural = Field(3, description="Skipped steps before the run ends as diverged.")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.steps is None and self.epochs is None:
            raise refusal(("steps",), None, "give steps or epochs, for example steps: 1000")
        if self.steps is not None and self.epochs is not None:
            raise refusal(("epochs",), self.epochs, f"steps: {self.steps} is given too; keep one of steps and epochs")
        return self


class Faults(Section):
    """Deadlines and retry budgets. Every wait of a run has one of these."""

    start_timeout_s: Seconds | None = Field(
        None, description="Until a role must be ready; None: 600 s and a second for each 100 MB of its model."
    )
    room_timeout_s: Seconds = Field(
        600, description="How long a role whose node is gone waits for room on another one."
    )
    score_timeout_s: Seconds = Field(
        300, description="One unit, from being sent to its labels; the answers that one generator writes for a step."
    )
    step_timeout_s: Seconds = Field(1800, description="One optimizer step, evaluation or checkpoint.")
    stall_timeout_s: Seconds | None = Field(
        None,
        description="Without anything scored, trained or saved, before the run is ended with 4; None: the deadlines "
        "above added up, score_timeout_s as often as a unit is tried.",
    )
    ping_interval_s: Seconds = Field(10.0, description="Between two questions to a process whether it is alive.")
    ping_timeout_s: Seconds = Field(60.0, description="Without an answer, before a process counts as dead.")
    max_unit_attempts: Positive = Field(5, description="How often one unit is sent to a teacher before the run ends.")
    max_teacher_restarts: Natural = Field(10, description="Per replica, without a unit scored in between.")
    max_student_restarts: Natural = Field(3, description="Of the group, without a new step or checkpoint in between.")


class Report(Section):
    """What is watched and shown."""

    generate: Natural = Field(3, description="Held-out prompts that student and teacher answer for the report.")
    generate_tokens: Positive = Field(64, description="Of one such answer, at most.")
    viewer_sequences: Natural = Field(4, description="Held-out texts in the token viewer; of trained ones up to 8.")
    prometheus_port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(
        None,
        description="Where the Ray that the run starts by itself serves metrics, to whoever reaches this machine; "
        "None: nowhere. A cluster that was there before serves them at its own ports.",
    )


class Run(Section):
    """One run: name and folder, student and teachers, the stations of its tasks, and how it is run."""

    name: str = Field(pattern=NAME, description="Letters, digits, dot, dash, underscore.")
    folder: Path | None = Field(None, description="Run folder; default runs/<name>.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Of everything that is drawn by chance.")
    runtime: Literal["ray", "in_process"] = Field(
        "ray", description="in_process: no Ray, one process, works under pdb."
    )
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: gpu where the cluster has any.")
    student: Student
    teacher: Teacher | None = Field(None, description="The only teacher, or one of teachers; none for hard labels.")
    teachers: dict[Name, Teacher] = Field({}, description="Several teachers by name, instead of teacher.")
    tasks: dict[Name, Task] = Field({}, description="Several tasks by name; the rest of one stands beside tasks.")
    route: Route | None = Field(None, description="Which of several teachers is asked about a row.")
    ensemble: Ensemble | None = Field(None, description="Several teachers that are asked about the same tokens.")
    prompts: Dataset | None = Field(None, description="The rows to train on.")
    data: Data = Data()
    answers: AnyAnswers = DatasetAnswers()
    labels: AnyLabels = TopK()
    rollouts: Rollouts | None = Field(None, description="Needed where the student writes answers.")
    reward: AnyReward | None = Field(None, description="What a function says of each answer, for terms that raise it.")
    align: AnyAlignment | None = Field(None, description="How labels of a teacher with another tokenizer are used.")
    objective: tuple[AnyTerm, ...] = Field((ForwardKl(),), min_length=1)
    optimizer: Optimizer = Optimizer()
    training: Training
    faults: Faults = Faults()
    report: Report = Report()
    store: Store | None = Field(None, description="Where labels are kept; None: each is made anew whenever it is due.")
    notify: Notify | None = Field(None, description="Who is told how the run ended.")
    trackers: tuple[AnyTracker, ...] = Field((), description="Where the numbers of the run go beside its folder.")

    @field_validator("folder")
    @classmethod
    def _home_is_a_folder(cls, folder: Path | None) -> Path | None:
        if folder is not None and folder.is_absolute() and folder == folder.parent:
            raise ValueError("the root of all files is no run folder; name one below it, for example runs/my-run")
        return folder if folder is None else expand_home(folder)

    @field_validator("teachers")
    @classmethod
    def _a_name_is_its_key(cls, teachers: dict[str, Teacher]) -> dict[str, Teacher]:
        for key, teacher in teachers.items():
            if "name" in teacher.model_fields_set and teacher.name != key:
                text = f"the name of a teacher is its key, {key}; remove name"
                raise refusal((key, "name"), teacher.name, text)
        return {key: teacher.model_copy(update={"name": key}) for key, teacher in teachers.items()}

    @field_validator("prompts")
    @classmethod
    def _there_are_rows(cls, prompts: Dataset | None, info: ValidationInfo) -> Dataset | None:
        if prompts is None and info.data.get("tasks") == {}:
            raise ValueError("'prompts' is missing: the rows to train on, for example prompts: {path: rows.jsonl}")
        return prompts

    @field_validator("labels")
    @classmethod
    def _labels_have_a_teacher(cls, labels: Labels | NoLabels, info: ValidationInfo) -> Labels | NoLabels:
        nobody = info.data.get("tasks") == {} == info.data.get("teachers") and info.data.get("teacher", cls) is None
        if nobody and not isinstance(labels, NoLabels):
            raise ValueError(NO_TEACHER)
        return labels

    @field_validator("trackers")
    @classmethod
    def _each_tracker_once(cls, trackers: tuple[TrackerChoice, ...]) -> tuple[TrackerChoice, ...]:
        places = [one.destination() for one in trackers]
        for i, place in enumerate(places):
            if place in places[:i]:
                text = f"goes to the same place as trackers.{places.index(place)}; remove one of the two"
                raise refusal((i,), trackers[i].kind, text)
        return trackers

    @model_validator(mode="after")
    def _sections_hold_together(self) -> Run:
        if broken := list(broken_rules(self)):
            raise refusals(broken)
        return self

    def named_teachers(self) -> dict[str, Teacher]:
        """All teachers that the configuration names, by their `name`."""
        if self.teacher is not None:
            return {self.teacher.name: self.teacher}
        return dict(self.teachers)

    def teachers_by_name(self) -> dict[str, Teacher]:
        """The teachers whose models the run reads: those that tasks ask; where none is asked the first that is named,
        whose template renders the rows. Empty for a run that names none."""
        named = self.named_teachers()
        asked = {name for task in self.resolved_tasks().values() for name in task.teachers}
        return {name: teacher for name, teacher in named.items() if name in asked} or dict(list(named.items())[:1])

    def choices(self) -> Iterator[tuple[str, Station, Section]]:
        """Every kind that is chosen and has a file behind it: where, of what station, with which parameters."""
        for name, holder in (("", self), *((f"tasks.{name}.", task) for name, task in self.tasks.items())):
            if holder.labels is not None and not isinstance(holder.labels, NoLabels):
                yield f"{name}labels", LABELS, holder.labels
            if holder.answers is not None:
                yield f"{name}answers", ANSWERS, holder.answers
            if holder.reward is not None:
                yield f"{name}reward", REWARDS, holder.reward
            if holder.align is not None:
                yield f"{name}align", ALIGNMENTS, holder.align
            own = ((i, term) for i, term in enumerate(holder.objective or ()) if "." in term.loss)
            yield from ((f"{name}objective.{i}", LOSSES, term) for i, term in own)
        for name, teacher in self.named_teachers().items():
            place = ".".join(map(str, place_of_teacher(self, name)))
            for role, replicas in teacher.roles().items():
                yield f"{place}.{role}.engine", ENGINES, replicas.engine
        if self.rollouts is not None:
            yield "rollouts.engine", ENGINES, self.rollouts.engine
        yield from ((f"trackers.{i}", TRACKERS, one) for i, one in enumerate(self.trackers))

    def resolved_tasks(self) -> Mapping[str, ResolvedTask]:
        """All tasks with every station filled in, by name; `main` alone where the run names none."""
        return resolve_tasks(self)
