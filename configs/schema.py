"""The whole configuration as pydantic models: what a run is, its defaults, and the rules between fields.

A field that chooses a kind takes the parameters of that kind beside it (`configs/stations.py`). Nothing here is
adjusted silently: a rule that fails says what to write instead. A `None` that means "decided from the hardware" is
decided by `cluster/placement/resolve.py`, never here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, ValidationInfo, field_validator, model_validator

from configs.answers import ANSWERS, AnyAnswers, DatasetAnswers
from configs.engines import ENGINES, AnyEngine, Hf, Vllm
from configs.labels import LABELS, AnyLabels, Labels, NoLabels, TopK
from configs.losses import AnyTerm, ForwardKl
from configs.paths import expand_home
from configs.prompts import Dataset
from configs.refusal import refusal, refusals
from configs.rules import NO_TEACHER, broken_rules, place_of_teacher
from configs.section import MOST_SECONDS, NAME, Bytes, DType, Natural, Positive, Seconds, Section, with_known_home
from configs.stations import Choice, Station
from configs.tasks import Name, ResolvedTask, Route, Task, resolve_tasks

LABEL_NAME = r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"
HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?"
COMMIT = r"[0-9a-f]{40}"


class ModelSource(Section):
    """Where a model comes from."""

    path: str = Field(min_length=1, description="Local folder in Hugging Face format, or a hub name.")
    revision: str | None = Field(None, description="Hub revision (branch, tag, commit); None for local folders.")
    trust_remote_code: bool = Field(False, description="Run code shipped with this model. Off unless named per model.")
    licence: str | None = Field(None, description="SPDX id or name of the licence, written into the model card.")
    local_copy: Path | None = Field(
        None, description="Folder on a disk of each node: the model is copied there once, and read from there."
    )

    @field_validator("path")
    @classmethod
    def _home_is_a_folder(cls, path: str) -> str:
        return str(expand_home(path)) if path.startswith("~") else with_known_home(path)

    @field_validator("local_copy")
    @classmethod
    def _copy_has_a_home(cls, folder: Path | None) -> Path | None:
        return folder if folder is None else Path(with_known_home(str(folder)))

    @model_validator(mode="after")
    def _foreign_code_is_pinned(self) -> ModelSource:
        looks_like_hub = re.fullmatch(HUB_NAME, self.path) is not None
        if self.trust_remote_code and looks_like_hub and not re.fullmatch(COMMIT, self.revision or ""):
            text = (
                "trust_remote_code runs whatever the hub holds on that day: name the commit that you have read, "
                f"revision: <40 hexadecimal digits>; or, where {self.path} is a local folder, write path: ./{self.path}"
            )
            raise refusal(("revision",), self.revision, text)
        return self


class Constraints(Section):
    """On which nodes the processes of a role may sit. Without it: wherever there is room, close together."""

    strategy: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        "pack",
        description="pack: few nodes; spread: many; strict_pack: one node or an error; strict_spread: a node each. Of "
        "student ranks among each other, of a teacher's replicas among each other.",
    )
    accelerator_type: str | None = Field(None, min_length=1, description="Ray's name of a kind of GPU, such as H100.")
    node_labels: dict[Annotated[str, Field(pattern=LABEL_NAME)], Annotated[str, Field(pattern=LABEL_VALUE)]] = Field(
        {}, description="Labels that a node must have, as given to `ray start --labels`."
    )
    nodes: Positive | None = Field(None, description="Exactly so many nodes; None: as many as it takes.")

    @model_validator(mode="after")
    def _strict_pack_is_one_node(self) -> Constraints:
        if self.strategy == "strict_pack" and self.nodes not in (None, 1):
            text = "strategy: strict_pack means one node: write nodes: 1, or another strategy"
            raise refusal(("nodes",), self.nodes, text)
        return self

    def check_members(self, members: int, noun: str) -> None:
        """Raises the refusal of a number of nodes that `members` processes cannot fill."""
        if self.nodes is None:
            return
        if self.nodes > members:
            text = f"is more than the {members} {noun}, and every node needs one: write at most {members}"
            raise refusal(("placement", "nodes"), self.nodes, text)
        if self.strategy == "strict_spread" and self.nodes != members:
            text = f"strategy: strict_spread gives each of the {members} {noun} a node: write nodes: {members}"
            raise refusal(("placement", "nodes"), self.nodes, text)


class LoRA(Section):
    """Low-rank adapters (arXiv 2106.09685) through peft."""

    rank: Positive = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Student(Section):
    """The model that learns, and how DeepSpeed shards it."""

    model: ModelSource
    ranks: Positive = Field(1, description="Training processes; one GPU each on GPU nodes, one core each on CPU.")
    dtype: DType = Field("auto", description="auto: bfloat16 on GPUs and on CPUs with amx_bf16, else float32.")
    zero_stage: Literal[1, 2, 3] = 2
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = Field(
        "none", description="Keep ZeRO state in host memory. parameters need zero_stage 3."
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "varlen"] = Field(
        "auto", description="auto: the fastest packed attention this device offers (trainer/model/attention.py)."
    )
    activation_checkpointing: bool = False
    lora: LoRA | None = None
    loss_chunk_rows: Positive = Field(512, description="Rows whose logits exist at once; bounds loss memory.")
    placement: Constraints = Constraints()

    @model_validator(mode="after")
    def _every_node_has_a_rank(self) -> Student:
        self.placement.check_members(self.ranks, "ranks")
        return self

    @model_validator(mode="after")
    def _offload_needs_stage_three(self) -> Student:
        if self.offload == "optimizer_and_parameters" and self.zero_stage != 3:
            text = f"needs zero_stage: 3, here it is {self.zero_stage}; write zero_stage: 3 or offload: optimizer"
            raise refusal(("offload",), self.offload, text)
        return self


class Replicas(Section):
    """Engine processes of one kind that share the work."""

    engine: AnyEngine = Vllm()
    replicas: Positive = 1
    tensor_parallel_size: Positive = Field(1, description="Devices that hold one copy together.")
    dtype: DType = "auto"
    placement: Constraints = Constraints()
    may_span_nodes: bool = Field(
        False, description="Let one copy be split over nodes where it is larger than each; the network then slows it."
    )

    @model_validator(mode="after")
    def _every_node_has_a_replica(self) -> Replicas:
        if self.may_span_nodes and self.placement.nodes is not None:
            text = "counts whole replicas a node, and may_span_nodes: true splits them; remove one of the two"
            raise refusal(("placement", "nodes"), self.placement.nodes, text)
        self.placement.check_members(self.replicas, "replicas")
        return self

    @model_validator(mode="after")
    def _hf_is_one_device(self) -> Replicas:
        if isinstance(self.engine, Hf) and self.tensor_parallel_size != 1:
            text = "engine hf runs on one device: write tensor_parallel_size: 1, or engine: vllm"
            raise refusal(("tensor_parallel_size",), self.tensor_parallel_size, text)
        return self


class Teacher(Section):
    """The model that judges, and writes if asked."""

    name: str = Field("teacher", pattern=NAME)
    model: ModelSource
    chat_template: str | None = Field(None, description="Path of a jinja file; None: the teacher's own template.")
    scorer: Replicas = Field(default_factory=Replicas)
    generator: Replicas | None = Field(None, description="Needed where the teacher writes answers.")

    @field_validator("chat_template")
    @classmethod
    def _template_has_a_home(cls, path: str | None) -> str | None:
        return path if path is None else with_known_home(path)

    def roles(self) -> dict[str, Replicas]:
        """The replicas by role, `scorer` first."""
        return {"scorer": self.scorer} | ({} if self.generator is None else {"generator": self.generator})


class Data(Section):
    """Rows and how they become token sequences."""

    evaluation: Dataset | None = Field(None, description="Held-out rows with answers; scored once, at start.")
    max_length: Positive = Field(2048, description="Tokens of prompt and answer together.")
    on_too_long: Literal["error", "drop", "truncate"] = "error"
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip: counted and listed in rejected.jsonl.")
    special_tokens_in_text: Literal["warn", "allow", "escape", "error"] = Field(
        "warn",
        description="Strings such as </s> in a row's text. warn, allow: they become control tokens, and check tells or "
        "does not; escape: they are read as plain text; error: the row is bad.",
    )
    shuffle: bool = True

    @model_validator(mode="after")
    def _evaluation_has_answers(self) -> Data:
        if self.evaluation is not None and self.evaluation.format == "prompt":
            raise refusal(("evaluation", "format"), "prompt", "held-out rows need answers: name another format")
        return self


class Optimizer(Section):
    """AdamW (arXiv 1711.05101) and its schedule."""

    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Natural = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="Last learning rate over the peak.")


class Training(Section):
    """Steps, batches, and what happens every so many of them."""

    steps: Positive | None = Field(None, description="Optimizer steps; give this or epochs.")
    epochs: Positive | None = None
    sequences_per_step: Positive = 32
    micro_batch_tokens: Positive = Field(4096, description="Token budget of one packed micro-batch of one rank.")
    depth: Natural = Field(2, description="Steps the teacher may run ahead of the student; 0: synchronous.")
    max_label_bytes: Bytes = Field(2 * 2**30, description="Labels made and not yet trained, over all ranks.")
    evaluate_every: Natural = Field(0, description="Steps between evaluations; 0: only before and after.")
    save_every: Natural = Field(0, description="Steps between checkpoints; 0: by time, and at the end.")
    save_every_minutes: Annotated[float, Field(ge=0, le=MOST_SECONDS / 60)] = Field(
        10, description="Save after the step at hand when the last checkpoint is so old; 0: by steps alone."
    )
    keep_checkpoints: Positive = 2
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
    score_timeout_s: Seconds = Field(300, description="One unit, from being sent to its labels.")
    step_timeout_s: Seconds = Field(1800, description="One optimizer step, evaluation or checkpoint.")
    stall_timeout_s: Seconds | None = Field(
        None,
        description="Without anything scored, trained or saved, before the run is ended with 4; None: the deadlines "
        "above added up, score_timeout_s as often as a unit is tried.",
    )
    ping_interval_s: Seconds = 10.0
    ping_timeout_s: Seconds = 60.0
    max_unit_attempts: Positive = 5
    max_teacher_restarts: Natural = Field(10, description="Per replica, without a unit scored in between.")
    max_student_restarts: Natural = Field(3, description="Of the group, without a new step or checkpoint in between.")


class Report(Section):
    """What is watched and shown."""

    tensorboard: bool = False
    generate: Natural = Field(3, description="Held-out prompts that student and teacher answer for the report.")
    generate_tokens: Positive = 64
    viewer_sequences: Natural = Field(4, description="Held-out sequences in the token viewer.")


class Run(Section):
    """One run: name and folder, student and teachers, the stations of its tasks, and how it is run."""

    name: str = Field(pattern=NAME, description="Letters, digits, dot, dash, underscore.")
    folder: Path | None = Field(None, description="Run folder; default runs/<name>.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    runtime: Literal["ray", "in_process"] = Field(
        "ray", description="in_process: no Ray, one process, works under pdb."
    )
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: gpu where the cluster has any.")
    student: Student
    teacher: Teacher | None = Field(None, description="The only teacher, or one of teachers; none for hard labels.")
    teachers: dict[Name, Teacher] = Field({}, description="Several teachers by name, instead of teacher.")
    tasks: dict[Name, Task] = Field({}, description="Several tasks by name; the rest of one stands beside tasks.")
    route: Route | None = Field(None, description="Which of several teachers is asked about a row.")
    prompts: Dataset | None = Field(None, description="The rows to train on.")
    data: Data = Data()
    answers: AnyAnswers = DatasetAnswers()
    labels: AnyLabels = TopK()
    objective: tuple[AnyTerm, ...] = Field((ForwardKl(),), min_length=1)
    optimizer: Optimizer = Optimizer()
    training: Training
    faults: Faults = Faults()
    report: Report = Report()

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

    @model_validator(mode="after")
    def _sections_hold_together(self) -> Run:
        if broken := list(broken_rules(self)):
            raise refusals(broken)
        return self

    def teachers_by_name(self) -> dict[str, Teacher]:
        """All teachers; their `name` is their key. Empty for a run that asks none."""
        if self.teacher is not None:
            return {self.teacher.name: self.teacher}
        return dict(self.teachers)

    def choices(self) -> Iterator[tuple[str, Station, Choice]]:
        """Every kind that is chosen and has code behind it: where, of what station, with which parameters."""
        for name, holder in (("", self), *((f"tasks.{name}.", task) for name, task in self.tasks.items())):
            if holder.labels is not None and not isinstance(holder.labels, NoLabels):
                yield f"{name}labels", LABELS, holder.labels
            if holder.answers is not None:
                yield f"{name}answers", ANSWERS, holder.answers
        for name, teacher in self.teachers_by_name().items():
            place = ".".join(map(str, place_of_teacher(self, name)))
            for role, replicas in teacher.roles().items():
                yield f"{place}.{role}.engine", ENGINES, replicas.engine

    def resolved_tasks(self) -> Mapping[str, ResolvedTask]:
        """All tasks with every station filled in, by name; `main` alone where the run names none."""
        return resolve_tasks(self)
