"""From a configuration and machines to everything a run decides from them, as a pure function.

    Run + Hardware -> accelerator, dtypes -> engine arguments, DeepSpeed JSON, environments -> placement -> Resolved

No model folder is read and nothing is started, so the settings of an eight-GPU node are tested as golden files on a
laptop. Whatever is chosen for the user says so in `reasons`; whatever they should know, in `warnings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.engines.plan import EnginePlan, Sampling
from cluster.placement.groups import Placement, RoleRequest
from cluster.placement.hardware import Hardware, gpu_has_bfloat16
from cluster.placement.topology import place
from cluster.runtime import (
    CPU,
    GPU,
    SCORER,
    STUDENT,
    WRITER,
    Accelerator,
    Role,
    actors_of,
    backend_of,
    device_type_of,
    environment,
)
from configs.answers import TeacherAnswers
from configs.engines import ENGINES, Vllm
from configs.labels import HELD_OUT, Labels
from configs.models import ModelSource, Replicas, Teacher
from configs.rules import teacher_place
from configs.schema import Run
from trainer.errors import ConfigError
from trainer.labels.encoding import TeacherShape, load_encoding
from trainer.model.attention_choice import (
    choose_attention,
    ignores_window,
    refuse_changing_rope,
    refuse_silent_windows,
    refuse_unpackable,
)
from trainer.model.zero_config import deepspeed_config
from trainer.types import StudentPlan

START_BASE_S = 600.0
"""Until a role must be ready, beside what its model's size asks for: processes, imports, compiling, a busy machine."""

LOAD_BYTES_PER_S = 100e6
"""The slowest reading of weights that is still taken for progress: a network disk that several nodes share."""

MAX_THREADS = 8
"""More threads of one process gain little; more ranks or replicas use the cores."""


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """What is known of one teacher before it starts."""

    config: Any | None = None  # of transformers: decides how it can be split, and what of it vLLM must not use
    num_bytes: int | None = None  # of its weights, for the deadlines
    weights_version: str | None = None  # in label headers; None: its revision
    stop_token_ids: tuple[int, ...] = ()  # end an answer that it writes


@dataclass(frozen=True, slots=True)
class TeacherPlans:
    """The engines of one teacher; None where no task asks for what it would do."""

    scorer: EnginePlan | None
    writer: EnginePlan | None

    @property
    def started(self) -> tuple[EnginePlan, ...]:
        return tuple(plan for plan in (self.scorer, self.writer) if plan is not None)


@dataclass(frozen=True, slots=True)
class Resolved:
    """All that follows from a run and its machines."""

    accelerator: Accelerator
    student: StudentPlan
    student_environment: Mapping[str, str]  # of every rank's process; `student_environment` of runtime.py adds the rank
    teachers: Mapping[str, TeacherPlans]  # by name; without those that no task asks
    placement: Placement
    reasons: tuple[str, ...]  # one line for each choice made for the user
    warnings: tuple[str, ...]

    @property
    def engines(self) -> tuple[EnginePlan, ...]:
        """Of all teachers."""
        return tuple(plan for plans in self.teachers.values() for plan in plans.started)

    @property
    def teacher_dtypes(self) -> dict[str, str]:
        """What the labels of each teacher are made in."""
        return {name: plans.started[0].dtype for name, plans in self.teachers.items()}


def resolve(
    run: Run,
    hardware: Hardware,
    *,
    vocabulary_size: int,
    tokenizer_fingerprint: str,
    student_config: Any | None = None,
    student_bytes: int | None = None,
    teachers: Mapping[str, TeacherFacts] | None = None,
    offline: bool = False,
    bytecode_folder: str | None = None,
) -> Resolved:
    """Decide everything that depends on the machines. Raises `ConfigError` where they do not allow the run.

    `vocabulary_size` is the true one, without padding. `student_config`, a transformers config, decides attention
    "auto" and sizes ZeRO-3's buffers; without it attention stays as written. `student_bytes`: of its weights, where
    known, for the deadline. `teachers`: by name, as far as something is known. `offline`: all models are folders.
    `bytecode_folder`: of `runtime.bytecode_folder()`.
    """
    facts = {name: (teachers or {}).get(name, TeacherFacts()) for name in run.teachers_by_name()}
    for name, known in facts.items():
        if known.config is not None:
            check_split(run, name, known.config)
            check_rotation(run, name, known.config)
    accelerator = _accelerator(run, hardware)
    placement = Placement() if run.runtime == "in_process" else place(roles_of(run, accelerator), hardware)
    dtypes = _Dtypes(hardware, accelerator)
    tables = _Tables(accelerator, _threads(hardware, placement), offline, bytecode_folder)
    shared = _Shared(run, accelerator, placement, vocabulary_size, tokenizer_fingerprint)
    student_dtype = dtypes.choose("student", run.student.dtype)
    student = _student_plan(run, accelerator, student_dtype, student_config, num_bytes=student_bytes)
    plans, reasons = {}, []
    for name in started_roles(run):
        engines = _Engines(shared, run.teachers_by_name()[name], facts[name])
        plans[name] = engines.plans(dtypes, tables)
        reasons += engines.reasons
    student_threads = None
    if accelerator == GPU and run.student.offload != "none":
        student_threads = _cores_per_gpu(hardware)  # the optimizer runs on the host, on every core there is
    return Resolved(
        accelerator=accelerator,
        student=student,
        student_environment=tables.of(STUDENT, threads=student_threads),
        teachers=plans,
        placement=placement,
        reasons=(
            _accelerator_reason(run, hardware, accelerator),
            *dict.fromkeys(dtypes.reasons),
            *reasons,
        ),
        warnings=(*_placement_warnings(hardware, placement, accelerator), *dict.fromkeys(dtypes.warnings)),
    )


def started_roles(run: Run) -> dict[str, dict[Role, Replicas]]:
    """The replicas that a run starts, by teacher and role: scorers where a task takes labels, writers where one takes
    answers. A teacher that no task asks is left out."""
    roles: dict[str, dict[Role, Replicas]] = {}
    for name, teacher in run.teachers_by_name().items():
        tasks = [task for task in run.resolved_tasks().values() if name in task.teachers]
        asked: dict[Role, Replicas] = {}
        if any(isinstance(task.labels, Labels) for task in tasks):
            asked[SCORER] = teacher.scorer
        if teacher.generator is not None and any(task.answers.needs_generator for task in tasks):
            asked[WRITER] = teacher.generator
        if asked:
            roles[name] = asked
    return roles


def roles_of(run: Run, accelerator: Accelerator) -> tuple[RoleRequest, ...]:
    """The actors of a run."""
    roles = [RoleRequest(STUDENT, run.student.ranks, accelerator, constraints=run.student.placement)]
    for name, asked in started_roles(run).items():
        for role, replicas in asked.items():
            request = RoleRequest(
                actors_of(role, _prefix(run, name)),
                replicas.replicas,
                accelerator,
                shards=replicas.tensor_parallel_size,
                constraints=replicas.placement,
                may_span_nodes=replicas.may_span_nodes,
            )
            roles.append(request)
    return tuple(roles)


def _prefix(run: Run, teacher: str) -> str:
    """What the names of a teacher's processes begin with: nothing where it is the only one."""
    return teacher if run.teachers else ""


def start_timeout_s(run: Run, model: ModelSource, num_bytes: int | None) -> float:
    """Until a role with this model must be ready: as configured, else longer for larger weights, twice where they are
    copied to the node first. Where the size is not known, weights of the hub that are not here yet, the base alone."""
    if run.faults.start_timeout_s is not None:
        return run.faults.start_timeout_s
    reads = 1 if model.local_copy is None else 2
    return START_BASE_S + round(reads * (num_bytes or 0) / LOAD_BYTES_PER_S)


def check_rotation(run: Run, name: str, teacher_config: Any) -> None:
    """Raises `ConfigError` where vLLM would rotate positions, or see a window, otherwise than transformers' model of
    the teacher."""
    teacher = run.teachers_by_name()[name]
    if any(isinstance(replicas.engine, Vllm) for replicas in teacher.roles().values()):
        why = "vLLM rotates every row as it would the longest, transformers each by its own length"
        refuse_changing_rope(teacher_config, max_length=run.data.max_length, role="teacher", why=why)
        trusted = teacher.model.trust_remote_code
        refuse_silent_windows(teacher_config, max_length=run.data.max_length, trust_remote_code=trusted)


WIDER_IN_VLLM = ("cohere2",)
"""Architectures whose layers see one token more in vLLM 0.32 (its commandr.py says why) than in transformers."""


def vllm_overrides(config: Any, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """`hf_overrides` by which vLLM's layers see as far back as those of transformers' model do, and labels are those of
    one model: it gives a `sliding_window` to architectures that have none, and to some another than transformers."""
    text = config.get_text_config()
    if ignores_window(config, role="teacher.model", trust_remote_code=trust_remote_code):
        window = {"sliding_window": None}
    elif text.model_type in WIDER_IN_VLLM and text.sliding_window is not None:
        window = {"sliding_window": text.sliding_window - 1}
    else:
        return {}
    return window if text is config else {"text_config": window}


def check_split(run: Run, name: str, teacher_config: Any) -> None:
    """vLLM splits a model by attention heads. Raises `ConfigError` where tensor_parallel_size does not divide them."""
    text = teacher_config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    shared = getattr(text, "num_key_value_heads", None) or heads
    for role, replicas in run.teachers_by_name()[name].roles().items():
        shards = replicas.tensor_parallel_size
        if not heads or shards == 1:
            continue
        place = f"{teacher_place(run, name)}.{role}.tensor_parallel_size: {shards}"
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
        if heads % shards:
            raise ConfigError(f"{place} does not divide the teacher's {heads} attention heads; write one of {fitting}")
        if shards not in fitting:
            raise ConfigError(
                f"{place} neither divides the teacher's {shared} key-value heads nor is a multiple of them; write one "
                f"of {fitting}"
            )


def _accelerator(run: Run, hardware: Hardware) -> Accelerator:
    if run.accelerator == "auto":
        return GPU if hardware.num_gpus else CPU
    if run.accelerator == GPU and not hardware.num_gpus:
        raise ConfigError(
            f"accelerator: {GPU}, and there is no GPU ({hardware.describe()}). Check the driver, or write auto"
        )
    return run.accelerator


def _accelerator_reason(run: Run, hardware: Hardware, accelerator: Accelerator) -> str:
    how = "as configured" if run.accelerator != "auto" else hardware.describe()
    return f"accelerator: {accelerator} ({how})"


class _Dtypes:
    """dtype by capability, and why."""

    def __init__(self, hardware: Hardware, accelerator: Accelerator) -> None:
        if accelerator == GPU:
            old = [kind for kind in hardware.gpu_kinds if not gpu_has_bfloat16(kind)]
            self._fast = not old
            self._why = f"{', '.join(old)} has no bfloat16" if old else f"{', '.join(hardware.gpu_kinds)}"
        else:
            self._fast = all(node.cpu_has_amx_bf16 for node in hardware.nodes)
            self._why = f"this CPU has {'' if self._fast else 'no '}amx_bf16"
        self._accelerator = accelerator
        self.reasons: list[str] = []
        self.warnings: list[str] = []

    def choose(self, name: str, wanted: str) -> str:
        if wanted == "auto":
            dtype = "bfloat16" if self._fast else "float32"
            self.reasons.append(f"{name}: {dtype} ({self._why})")
            return dtype
        if wanted == "bfloat16" and not self._fast:
            if self._accelerator == GPU:
                raise ConfigError(f"{name}: dtype: bfloat16, and {self._why}. Write dtype: auto or float32")
            self.warnings.append(f"{name}: bfloat16, and {self._why}: several times slower than float32 here")
        return wanted


@dataclass(frozen=True, slots=True)
class _Tables:
    """What all environments of a run have in common."""

    accelerator: Accelerator
    threads: int | None
    offline: bool
    bytecode_folder: str | None

    def of(self, role: Role, *, threads: int | None = None) -> dict[str, str]:
        return environment(
            role,
            self.accelerator,
            threads=threads or self.threads,
            offline=self.offline,
            bytecode_folder=self.bytecode_folder,
        )


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all engines of a run have in common."""

    run: Run
    accelerator: Accelerator
    placement: Placement
    vocabulary_size: int
    tokenizer_fingerprint: str


class _Engines:
    """Engine plans of one teacher."""

    def __init__(self, shared: _Shared, teacher: Teacher, facts: TeacherFacts) -> None:
        self._shared, self._teacher, self._facts = shared, teacher, facts
        self.reasons: list[str] = []
        self._tasks = [t for t in shared.run.resolved_tasks().values() if teacher.name in t.teachers]
        labels = [task.labels for task in self._tasks if isinstance(task.labels, Labels)]
        self._encodings = tuple(dict.fromkeys((*labels, HELD_OUT)))
        self._overrides = {}
        if facts.config is None:
            return
        self._overrides = vllm_overrides(facts.config, trust_remote_code=teacher.model.trust_remote_code)
        text = facts.config.get_text_config()
        if self._overrides and text.model_type not in WIDER_IN_VLLM:
            self.reasons.append(
                f"{teacher_place(shared.run, teacher.name)}: attends without a window: {text.model_type} has none in "
                f"transformers, whatever its configuration says (sliding_window: {text.sliding_window})"
            )

    def plans(self, dtypes: _Dtypes, tables: _Tables) -> TeacherPlans:
        asked = started_roles(self._shared.run)[self._teacher.name]
        made = {role: self._plan(role, replicas, dtypes, tables) for role, replicas in asked.items()}
        return TeacherPlans(made.get(SCORER), made.get(WRITER))

    def _plan(self, role: Role, replicas: Replicas, dtypes: _Dtypes, tables: _Tables) -> EnginePlan:
        run, model = self._shared.run, self._teacher.model
        dtype = dtypes.choose(f"{teacher_place(run, self._teacher.name)}.{role}", replicas.dtype)
        return EnginePlan(
            role=role,
            prefix=_prefix(run, self._teacher.name),
            engine=replicas.engine,
            model=model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            device_type=device_type_of(self._shared.accelerator),
            tensor_parallel_size=replicas.tensor_parallel_size,
            max_length=run.data.max_length,
            arguments=self._arguments(role, replicas, dtype),
            environment=tables.of(role),
            teacher=self._teacher.name,
            weights_version=self._facts.weights_version or model.revision or "unversioned",
            tokenizer_fingerprint=self._shared.tokenizer_fingerprint,
            vocabulary_size=self._shared.vocabulary_size,
            encodings=self._encodings if role == SCORER else (),
            sampling=self._sampling() if role == WRITER else None,
            start_timeout_s=start_timeout_s(run, model, self._facts.num_bytes),
            local_copy=None if model.local_copy is None else str(model.local_copy),
        )

    def _sampling(self) -> Sampling:
        answers = next(task.answers for task in self._tasks if task.answers.needs_generator)
        assert isinstance(answers, TeacherAnswers), answers
        return Sampling(
            max_new_tokens=answers.max_new_tokens,
            temperature=answers.temperature,
            top_p=answers.top_p,
            seed=self._shared.run.seed,
            stop_token_ids=self._facts.stop_token_ids,
        )

    def _arguments(self, role: Role, replicas: Replicas, dtype: str) -> dict[str, Any]:
        engine = ENGINES.load(replicas.engine)
        arguments = engine.arguments(
            role=role,
            dtype=dtype,
            tensor_parallel_size=replicas.tensor_parallel_size,
            max_length=self._shared.run.data.max_length,
            accelerator=self._shared.accelerator,
            kept_events=self._kept_events(),
        )
        actors = actors_of(role, _prefix(self._shared.run, self._teacher.name))
        if any(group.executor == "ray" for group in self._shared.placement.of_role(actors)):
            arguments["distributed_executor_backend"] = "ray"  # a replica larger than every node
        if self._overrides and isinstance(replicas.engine, Vllm):
            arguments["hf_overrides"] = arguments.get("hf_overrides", {}) | self._overrides
        return arguments

    def _kept_events(self) -> int:
        """The largest number of ids of a row that a label of this run names; 0 where labels name none."""
        made = [load_encoding(labels) for labels in self._encodings]
        shape = _any_shape(self._shared.vocabulary_size)
        layouts = [encoding.layout(shape) for encoding in made if encoding.needs == "logits"]
        return max((column.width for layout in layouts for column in layout), default=0)


def _any_shape(vocabulary_size: int) -> TeacherShape:
    """A shape whose hidden width no label of logits depends on."""
    import torch

    return TeacherShape(vocabulary_size=vocabulary_size, hidden_size=1, dtype=torch.float32)


def _student_plan(
    run: Run, accelerator: Accelerator, dtype: str, student_config: Any | None, *, num_bytes: int | None
) -> StudentPlan:
    device_type = device_type_of(accelerator)
    attention, hidden_size = run.student.attention, None
    if student_config is not None:
        hidden_size = student_config.get_text_config().hidden_size
        trusted = run.student.model.trust_remote_code
        refuse_unpackable(student_config, max_length=run.data.max_length, trust_remote_code=trusted)
        attention = choose_attention(
            attention,
            device_type=device_type,
            dtype=dtype,
            config=student_config,
            trust_remote_code=trusted,
        )
    return StudentPlan(
        dtype=dtype,
        device_type=device_type,
        backend=backend_of(accelerator),
        attention=attention,
        deepspeed=deepspeed_config(
            student=run.student,
            optimizer=run.optimizer,
            dtype=dtype,
            on_accelerator=accelerator == GPU,
            hidden_size=hidden_size,
        ),
        collective_timeout_s=run.faults.step_timeout_s,
        start_timeout_s=start_timeout_s(run, run.student.model, num_bytes),
    )


def _threads(hardware: Hardware, placement: Placement) -> int | None:
    """OpenMP threads of each process on hosts: contended threads cost twice what one costs. None on GPUs."""
    if placement.num_gpus:
        return None
    return max(1, min(MAX_THREADS, hardware.num_cpus // max(1, placement.num_slots)))


def _cores_per_gpu(hardware: Hardware) -> int:
    return max(1, min(node.num_cpus // len(node.gpus) for node in hardware.nodes if node.gpus))


def _placement_warnings(hardware: Hardware, placement: Placement, accelerator: Accelerator) -> list[str]:
    warnings = []
    slots = placement.num_slots
    if accelerator == CPU and slots > hardware.num_cpus:
        warnings.append(
            f"{slots} processes share {hardware.num_cpus} cores: they take turns, which is slower but not wrong"
        )
    student = placement.of_role(STUDENT)
    unbound = any(not any(key.startswith("accelerator_type") for key in group.bundles[0]) for group in student)
    if accelerator == GPU and len(hardware.gpu_kinds) > 1 and unbound:
        kinds = ", ".join(hardware.gpu_kinds)
        warnings.append(f"no kind of GPU ({kinds}) can hold all student ranks: every step waits for the slowest kind")
    return warnings
