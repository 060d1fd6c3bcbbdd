"""The memory of all roles of a run, as a function of its configuration, the sizes of its models, and the devices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.placement.choices import DtypeRule
from cluster.placement.memory.parts import Part, RoleMemory
from cluster.placement.memory.processes import CONTROLLER_BASE, RAY_BASE
from cluster.placement.memory.student import StudentLoad, fallback_pass, student_memory
from cluster.placement.memory.teacher import EngineLoad, engine_memory
from cluster.placement.memory.zero import FLOAT32
from cluster.placement.roles import prefix_of, rollouts_of, started_roles, writes_beside
from cluster.runtime import CONTROLLER, CPU, GENERATOR, GPU, ROLLOUT, SCORER, STUDENT, Role, actors_of
from configs.engines import ENGINES, FromStore, Vllm
from configs.held_out import held_out_sets
from configs.labels import Hidden
from configs.losses import Features
from configs.models import Replicas, Rollouts, Teacher
from configs.rules import teacher_place
from configs.schema import Run
from configs.tasks import ResolvedTask
from trainer.model.sizes import ModelSizes, PassMemory
from trainer.model.zero_config import deepspeed_config

WIDTHS = {"bfloat16": 2, "float32": 4}

SHARED = {"weights", "packing of weights", "process"}
"""By the engines of one process: weights are packed one after the other."""

Body = Callable[[Run, str], PassMemory | None]
"""One pass of the student's body at `pass_tokens` of the run, in a dtype."""


@dataclass(frozen=True, slots=True)
class KnownSizes:
    """What was read of a run's models."""

    student: Callable[[Run], ModelSizes]  # with the run's adapters
    body: Body
    teachers: Mapping[str, ModelSizes]  # by name
    quantised: Mapping[str, int]  # name -> bytes of the files, of teachers that are held as they are stored
    label_bytes: int = 0  # of one row of labels, at most
    student_file_bytes: int | None = None  # of its weights, where they are here
    stored: Mapping[str, int] = field(default_factory=dict)  # name -> bytes of a weight in a teacher's files


def pass_tokens(run: Run) -> int:
    """Of the largest micro-batch: a sequence is never cut, so that one may be longer than the budget."""
    return max(run.training.micro_batch_tokens, run.data.max_length)


def memory_needs(run: Run, known: KnownSizes, rule: DtypeRule) -> tuple[RoleMemory, ...]:
    """`rule`: which accelerator and dtypes the machines have."""
    found = [_student(run, known, rule)]
    for name, roles in started_roles(run).items():
        teacher = run.teachers_by_name()[name]
        engines = {role: _engine(run, known, rule, teacher, role, replicas) for role, replicas in roles.items()}
        found += [_beside(engines)] if writes_beside(run, name, rule.accelerator) else engines.values()
    ray = [Part("process", CONTROLLER_BASE), Part("Ray", RAY_BASE)]
    if (rollouts := rollouts_of(run)) is not None:
        found.append(_rollouts(run, known, rule, rollouts))
        width = WIDTHS[rule.choose("rollouts", rollouts.dtype)]
        ray.append(Part("weights for rollouts", known.student(run).all * width))  # in Ray's object store
    if run.runtime == "in_process":
        return (_in_one_process(found),)
    return (*found, RoleMemory(CONTROLLER, 1, host=tuple(ray)))


def _student(run: Run, known: KnownSizes, rule: DtypeRule) -> RoleMemory:
    dtype, tokens, features = rule.choose(STUDENT, run.student.dtype), pass_tokens(run), _features(run, known)
    sizes = known.student(run)
    sizes = replace(sizes, trained=(*sizes.trained, *(one.projector for one in features if one.projector)))
    body = known.body(run, dtype) or fallback_pass(
        sizes, tokens, WIDTHS[dtype], checkpointing=run.student.activation_checkpointing
    )
    config = deepspeed_config(
        student=run.student,
        optimizer=run.optimizer,
        dtype=dtype,
        on_accelerator=rule.accelerator == GPU,
        hidden_size=sizes.hidden_size,
        weight_bytes=known.student_file_bytes,
    )
    step_tokens = run.training.sequences_per_step * run.data.max_length
    load = StudentLoad(
        ranks=run.student.ranks,
        accelerator=rule.accelerator,
        width=WIDTHS[dtype],
        deepspeed=config,
        chunk_rows=run.student.loss_chunk_rows,
        rows=tokens,
        micro_batches=math.ceil(step_tokens / (run.student.ranks * tokens)),
        teacher_heads=sum(heads := _teacher_heads(run, known, rule)),
        num_heads=len(heads),
        compared_teachers=max(map(_compared_teachers, run.resolved_tasks().values())),
        states=sum(one.row_bytes for one in features) * tokens,
        labels=_waiting_labels(run, known),
        batch_labels=tokens * known.label_bytes,
    )
    return student_memory(sizes, body, load)


@dataclass(frozen=True, slots=True)
class _Features:
    """A term on states inside both models."""

    projector: int  # elements; 0 without
    row_bytes: int  # the student's state, and in float32 what it becomes, the teacher's, and their difference


def _features(run: Run, known: KnownSizes) -> list[_Features]:
    student, found = known.student(run).hidden_size, []
    for task in run.resolved_tasks().values():
        for term in task.objective:
            if isinstance(term, Features) and task.teachers[0] in known.teachers:
                teacher = known.teachers[task.teachers[0]].hidden_size
                projector = student * teacher if term.projector == "linear" else 0
                found.append(_Features(projector, FLOAT32 * (student + 3 * teacher)))
    return found


def _compared_teachers(task: ResolvedTask) -> int:
    """Whose hidden states a chunk of a task's rows is compared with at once."""
    together = task.ensemble is not None and task.ensemble.how != "min_ce"
    return (len(task.teachers) if together else 1) if isinstance(task.soft_labels, Hidden) else 0


def _teacher_heads(run: Run, known: KnownSizes, rule: DtypeRule) -> list[int]:
    """Of each teacher whose hidden states come to the ranks: as labels, or of the held-out rows."""
    tasks = run.resolved_tasks().values()
    asked = {name for task in tasks if isinstance(task.soft_labels, Hidden) for name in task.teachers}
    if held_out_sets(run):
        asked |= {name for task in tasks if task.soft_labels is not None for name in task.teachers}
    dtypes = {name: rule.choose(name, run.teachers_by_name()[name].scorer.dtype) for name in asked}
    widths = {name: WIDTHS[dtype] for name, dtype in dtypes.items()}
    if rule.accelerator == CPU:  # ranks look into the file (`load_teacher_head`)
        widths |= known.stored
    return [known.teachers[name].head * widths[name] for name in asked & known.teachers.keys()]


def _waiting_labels(run: Run, known: KnownSizes) -> int:
    """Of the steps that are scored ahead and the one that is trained, in each rank."""
    rows = run.training.sequences_per_step * run.data.max_length * (run.training.depth + 1)
    return min(rows * known.label_bytes, run.training.max_label_bytes) // run.student.ranks


def _engine(
    run: Run, known: KnownSizes, rule: DtypeRule, teacher: Teacher, role: Role, replicas: Replicas
) -> RoleMemory:
    place = f"{teacher_place(run, teacher.name)}.{role}"
    dtype, sizes = rule.choose(place, replicas.dtype), known.teachers[teacher.name]
    from_store = isinstance(replicas.engine, FromStore)
    load = EngineLoad(
        role=role,
        actors=actors_of(role, prefix_of(run, teacher.name)),
        kind=replicas.engine.kind,
        replicas=replicas.replicas,
        shards=replicas.tensor_parallel_size,
        accelerator=CPU if from_store else rule.accelerator,
        width=WIDTHS[dtype],
        weights=0 if from_store else known.quantised.get(teacher.name, sizes.all * WIDTHS[dtype]),
        max_length=run.data.max_length,
        arguments=_arguments(run, rule, role, replicas, dtype) if isinstance(replicas.engine, Vllm) else {},
        cache_is_given=isinstance(replicas.engine, Vllm) and replicas.engine.kv_cache_bytes is not None,
    )
    return replace(engine_memory(sizes, load), place=place)


def _rollouts(run: Run, known: KnownSizes, rule: DtypeRule, rollouts: Rollouts) -> RoleMemory:
    """Of the engines that hold the student: its weights, and a bucket of new ones, twice while they are laid out."""
    dtype, sizes = rule.choose("rollouts", rollouts.dtype), known.student(run)
    load = EngineLoad(
        role=ROLLOUT,
        actors=ROLLOUT,
        kind=rollouts.engine.kind,
        replicas=rollouts.replicas,
        shards=rollouts.tensor_parallel_size,
        accelerator=rule.accelerator,
        width=WIDTHS[dtype],
        weights=sizes.all * WIDTHS[dtype],
        max_length=run.data.max_length,
        arguments=_arguments(run, rule, GENERATOR, rollouts, dtype) if isinstance(rollouts.engine, Vllm) else {},
        cache_is_given=isinstance(rollouts.engine, Vllm) and rollouts.engine.kv_cache_bytes is not None,
    )
    engine = engine_memory(sizes, load)
    bucket = Part("new weights", 2 * min(rollouts.bucket_bytes, load.weights))
    return replace(engine, place="rollouts", host=(*engine.host, bucket))


def _beside(engines: Mapping[Role, RoleMemory]) -> RoleMemory:
    """Of a process with both engines of a teacher: each works in memory of its own, at other times; weights and
    libraries are there once (`cluster/engines/vllm.py`)."""
    scorer, generator = engines[SCORER], engines[GENERATOR]
    own = tuple(replace(part, name=f"{part.name} of answers") for part in generator.host if part.name not in SHARED)
    return replace(scorer, host=(*scorer.host, *own))


def _arguments(run: Run, rule: DtypeRule, role: Role, replicas: Replicas, dtype: str) -> Mapping[str, Any]:
    return ENGINES.load(replicas.engine).arguments(
        role=role,
        dtype=dtype,
        tensor_parallel_size=replicas.tensor_parallel_size,
        max_length=run.data.max_length,
        accelerator=rule.accelerator,
    )


def _in_one_process(roles: list[RoleMemory]) -> RoleMemory:
    """Everything but what a process has anyway, which is there once."""
    names = Counter(part.name for role in roles for part in role.host)
    parts = [
        replace(part, name=f"{part.name} of the {role.role}") if names[part.name] > 1 else part
        for role in roles
        for part in (*role.host, *role.shared)
        if part.name != "process"
    ]
    base = max(part.num_bytes for role in roles for part in role.host if part.name == "process")
    device = tuple(part for role in roles for part in role.device)
    return RoleMemory("student and teachers", 1, device, (*parts, Part("process", base)))
