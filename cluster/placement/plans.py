"""What each process of a run is told: the plan of the student's ranks, and those of each teacher's engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.engines.plan import EnginePlan, StorePlan
from cluster.engines.vllm_limits import WIDER_IN_VLLM, kv_cache_bytes, vllm_overrides
from cluster.placement.choices import Choices
from cluster.placement.facts import KnownModel
from cluster.placement.roles import prefix_of, rollouts_of, started_roles, writes_beside
from cluster.runtime import CPU, GENERATOR, GPU, ROLLOUT, SCORER, STUDENT, Role, actors_of, backend_of, device_type_of
from configs.engines import ENGINES, Vllm
from configs.labels import HELD_OUT, Labels
from configs.models import ModelSource, Replicas, Teacher
from configs.rules import teacher_place
from configs.schema import Run
from configs.tasks import ResolvedTask
from trainer.model.attention_choice import choose_attention, refuse_unpackable
from trainer.model.zero_config import deepspeed_config
from trainer.types import StudentPlan

START_BASE_S = 600.0
"""Until a role must be ready, beside what its model's size asks for: processes, imports, compiling, a busy machine."""

LOAD_BYTES_PER_S = 100e6
"""The slowest reading of weights that is still taken for progress: a network disk that several nodes share."""


@dataclass(frozen=True, slots=True)
class TeacherPlans:
    """The engines of one teacher; None where no task asks for what it would do."""

    scorer: EnginePlan | None
    generator: EnginePlan | None

    @property
    def started(self) -> tuple[EnginePlan, ...]:
        return tuple(plan for plan in (self.scorer, self.generator) if plan is not None)


def student_plan(choices: Choices) -> StudentPlan:
    """What every rank is told."""
    run, model = choices.run, choices.run.student.model
    known, device_type = choices.facts.student, device_type_of(choices.accelerator)
    dtype = choices.dtypes.choose("student", run.student.dtype)
    attention, hidden_size = run.student.attention, None
    if known.config is not None:
        hidden_size = known.config.get_text_config().hidden_size
        trusted = model.trust_remote_code
        refuse_unpackable(known.config, max_length=run.data.max_length, trust_remote_code=trusted)
        attention = choose_attention(
            attention, device_type=device_type, dtype=dtype, config=known.config, trust_remote_code=trusted
        )
    return StudentPlan(
        dtype=dtype,
        device_type=device_type,
        backend=backend_of(choices.accelerator),
        attention=attention,
        deepspeed=deepspeed_config(
            student=run.student,
            optimizer=run.optimizer,
            dtype=dtype,
            on_accelerator=choices.accelerator == GPU,
            hidden_size=hidden_size,
            weight_bytes=known.num_bytes,
        ),
        collective_timeout_s=run.faults.step_timeout_s,
        start_timeout_s=_start_timeout_s(run, model, known.num_bytes),
    )


def teacher_plans(choices: Choices, name: str) -> TeacherPlans:
    """What the engines of a teacher are told."""
    teacher = _Teacher(choices, choices.run.teachers_by_name()[name])
    made = {role: teacher.plan(role, replicas) for role, replicas in started_roles(choices.run)[name].items()}
    scorer, generator = made.get(SCORER), made.get(GENERATOR)
    if writes_beside(choices.run, name, choices.accelerator):
        scorer = replace(scorer, beside=generator)
    return TeacherPlans(scorer, generator)


def rollout_plan(choices: Choices) -> EnginePlan | None:
    """What the engines are told that hold the student; None where it writes nothing."""
    run, rollouts = choices.run, rollouts_of(choices.run)
    if rollouts is None:
        return None
    model, known = run.student.model, choices.facts.student
    dtype = choices.dtypes.choose("rollouts", rollouts.dtype)
    arguments = ENGINES.load(rollouts.engine).arguments(
        role=GENERATOR,
        dtype=dtype,
        tensor_parallel_size=rollouts.tensor_parallel_size,
        max_length=run.data.max_length,
        accelerator=choices.accelerator,
        stop_strings=any(t.answers.stops_at_text for t in run.resolved_tasks().values() if t.answers.needs_rollouts),
    )
    if isinstance(rollouts.engine, Vllm) and (overrides := _overrides(known, model)):
        arguments["hf_overrides"] = arguments.get("hf_overrides", {}) | overrides
    return EnginePlan(
        role=ROLLOUT,
        engine=rollouts.engine,
        model=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=dtype,
        device_type=device_type_of(choices.accelerator),
        tensor_parallel_size=rollouts.tensor_parallel_size,
        max_length=run.data.max_length,
        arguments=arguments,
        environment=choices.environment(ROLLOUT),
        teacher=STUDENT,
        weights_version="0",
        tokenizer_fingerprint=choices.facts.tokenizer_fingerprint,
        vocabulary_size=choices.facts.vocabulary_size,
        start_timeout_s=_start_timeout_s(run, model, known.num_bytes),
        local_copy=None if model.local_copy is None else str(model.local_copy),
    )


def wanted_dtypes(run: Run) -> Iterator[tuple[str, str]]:
    """(role, dtype as configured) of every role that a run starts."""
    yield "student", run.student.dtype
    for name, roles in started_roles(run).items():
        for role, replicas in roles.items():
            yield f"{teacher_place(run, name)}.{role}", replicas.dtype
    if (rollouts := rollouts_of(run)) is not None:
        yield "rollouts", rollouts.dtype


def unused_window(choices: Choices, name: str) -> str | None:
    """Says where a teacher's configuration has a window that its architecture does not use."""
    known = choices.facts.teachers.get(name, KnownModel())
    if not _overrides(known, choices.run.teachers_by_name()[name].model):
        return None
    text = known.config.get_text_config()
    if text.model_type in WIDER_IN_VLLM:
        return None
    return (
        f"{teacher_place(choices.run, name)}: attends without a window: {text.model_type} has none in transformers, "
        f"whatever its configuration says (sliding_window: {text.sliding_window})"
    )


@dataclass(frozen=True, slots=True)
class _Teacher:
    """One teacher of a run."""

    choices: Choices
    teacher: Teacher

    def plan(self, role: Role, replicas: Replicas) -> EnginePlan:
        choices, run, model = self.choices, self.choices.run, self.teacher.model
        dtype = choices.dtypes.choose(f"{teacher_place(run, self.teacher.name)}.{role}", replicas.dtype)
        vocabulary_size, fingerprint = choices.facts.vocabulary_of(self.teacher.name)
        return EnginePlan(
            role=role,
            prefix=prefix_of(run, self.teacher.name),
            engine=replicas.engine,
            model=model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            device_type=device_type_of(choices.accelerator),
            tensor_parallel_size=replicas.tensor_parallel_size,
            max_length=run.data.max_length,
            arguments=self._arguments(role, replicas, dtype),
            environment=choices.environment(role),
            teacher=self.teacher.name,
            weights_version=model.revision or "unversioned",
            tokenizer_fingerprint=fingerprint,
            vocabulary_size=vocabulary_size,
            encodings=self._encodings() if role == SCORER else (),
            start_timeout_s=_start_timeout_s(run, model, self._known.num_bytes),
            store=self._store(dtype) if role == SCORER else None,
            local_copy=None if model.local_copy is None else str(model.local_copy),
        )

    def _store(self, dtype: str) -> StorePlan | None:
        """The engine counts as it is configured: that labels are only read changes nothing in them."""
        store, known, engine = self.choices.run.store, self._known, self.teacher.scorer.engine
        if store is None:
            return None
        size, fingerprint = self.choices.facts.vocabulary_of(self.teacher.name)
        told = {"kind": engine.kind, "load_format": engine.load_format} if isinstance(engine, Vllm) else engine.flat()
        teacher = {
            "files": dict(known.files or {}),
            "engine": told,
            "overrides": _overrides(known, self.teacher.model) if isinstance(engine, Vllm) else {},
            "dtype": dtype,
            "vocabulary_size": size,
            "tokenizer": fingerprint,
        }
        return StorePlan(str(store.path.absolute()), store.max_bytes, store.mode == "read_write", teacher)

    @property
    def _known(self) -> KnownModel:
        return self.choices.facts.teachers.get(self.teacher.name, KnownModel())

    def _arguments(self, role: Role, replicas: Replicas, dtype: str) -> dict[str, Any]:
        arguments = ENGINES.load(replicas.engine).arguments(
            role=role,
            dtype=dtype,
            tensor_parallel_size=replicas.tensor_parallel_size,
            max_length=self.choices.run.data.max_length,
            accelerator=self.choices.accelerator,
            stop_strings=any(task.answers.stops_at_text for task in self._tasks),
        )
        actors = actors_of(role, prefix_of(self.choices.run, self.teacher.name))
        if any(group.executor == "ray" for group in self.choices.placement.of_role(actors)):
            arguments["distributed_executor_backend"] = "ray"  # a replica larger than every node
        if isinstance(replicas.engine, Vllm):
            if overrides := _overrides(self._known, self.teacher.model):
                arguments["hf_overrides"] = arguments.get("hf_overrides", {}) | overrides
            if role == SCORER and self.choices.accelerator == CPU and replicas.engine.kv_cache_bytes is None:
                arguments["kv_cache_memory_bytes"] = self._scorer_cache(arguments, dtype)
        return arguments

    def _scorer_cache(self, arguments: Mapping[str, Any], dtype: str) -> int:
        """On a host: what a scorer's cache needs, and no more. A sequence is in it only while it is read: beside the
        tokens of a step there are those of one sequence that was begun, and what its last block leaves empty of it."""
        most = arguments["kv_cache_memory_bytes"]
        if self._known.config is None:
            return most
        tokens = arguments["max_num_batched_tokens"] + arguments["max_model_len"]
        tokens += arguments["max_num_seqs"] * arguments["block_size"]
        return min(most, kv_cache_bytes(self._known.config, num_tokens=tokens, dtype=dtype) or most)

    @property
    def _tasks(self) -> list[ResolvedTask]:
        """Those that ask this teacher."""
        return [task for task in self.choices.run.resolved_tasks().values() if self.teacher.name in task.teachers]

    def _encodings(self) -> tuple[Labels, ...]:
        """Of the tasks that ask this teacher, and of the held-out rows."""
        labels = [task.soft_labels for task in self._tasks if task.soft_labels is not None]
        return tuple(dict.fromkeys((*labels, HELD_OUT)))


def _overrides(known: KnownModel, source: ModelSource) -> dict[str, Any]:
    return {} if known.config is None else vllm_overrides(known.config, trust_remote_code=source.trust_remote_code)


def _start_timeout_s(run: Run, model: ModelSource, num_bytes: int | None) -> float:
    """Until a role with this model must be ready: as configured, else longer for larger weights, twice where they are
    copied to the node first. Where the size is not known, weights of the hub that are not here yet, the base alone."""
    if run.faults.start_timeout_s is not None:
        return run.faults.start_timeout_s
    reads = 1 if model.local_copy is None else 2
    return START_BASE_S + round(reads * (num_bytes or 0) / LOAD_BYTES_PER_S)
