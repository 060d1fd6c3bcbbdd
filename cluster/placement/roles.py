"""Which roles a run starts, and how many actors of each."""

from __future__ import annotations

from cluster.placement.groups import RoleRequest
from cluster.runtime import CPU, GENERATOR, ROLLOUT, SCORER, STUDENT, Accelerator, Role, actors_of
from configs.engines import FromStore
from configs.models import Replicas, Rollouts, Teacher
from configs.schema import Run


def started_roles(run: Run) -> dict[str, dict[Role, Replicas]]:
    """The replicas that a run starts, by teacher and role: scorers where a task takes labels, generators where one
    takes answers. A teacher that no task asks is left out."""
    roles: dict[str, dict[Role, Replicas]] = {}
    for name, teacher in run.teachers_by_name().items():
        tasks = [task for task in run.resolved_tasks().values() if name in task.teachers]
        asked: dict[Role, Replicas] = {}
        if any(task.soft_labels is not None for task in tasks):
            asked[SCORER] = _reader(teacher) if run.store and run.store.mode == "only" else teacher.scorer
        if teacher.generator is not None and any(task.answers.needs_generator for task in tasks):
            asked[GENERATOR] = teacher.generator
        if asked:
            roles[name] = asked
    return roles


def rollouts_of(run: Run) -> Rollouts | None:
    """The engines that hold the student; None where no task lets it write."""
    writes = any(task.answers.needs_rollouts for task in run.resolved_tasks().values())
    return run.rollouts if writes else None


def replicas_of(run: Run, role: Role, teacher: str) -> Replicas:
    """Of a role that is started."""
    if role != ROLLOUT:
        return started_roles(run)[teacher][role]
    assert run.rollouts is not None
    return run.rollouts


def _reader(teacher: Teacher) -> Replicas:
    """Who hands out the labels that the store holds: a process without a model, on a host's core."""
    return Replicas(engine=FromStore(), dtype=teacher.scorer.dtype)


def writes_beside(run: Run, teacher: str, accelerator: Accelerator) -> bool:
    """Whether a teacher's generators live in the processes of its scorers, as was asked for."""
    generator = started_roles(run)[teacher].get(GENERATOR)
    return generator is not None and generator.beside_scorer and not apart_because(run, teacher, accelerator)


def apart_because(run: Run, teacher: str, accelerator: Accelerator) -> str:
    """Why generators cannot live in the processes of the scorers; empty where they can."""
    scorer, generator = run.teachers_by_name()[teacher].scorer, run.teachers_by_name()[teacher].generator
    judges = started_roles(run)[teacher].get(SCORER)
    if accelerator != CPU:
        return "on GPUs each has its own"
    if judges is None or isinstance(judges.engine, FromStore):
        return "no scorer is started"
    if max(scorer.tensor_parallel_size, generator.tensor_parallel_size) > 1:
        return "tensor_parallel_size is more than 1"
    if scorer.replicas != generator.replicas:
        return f"there are {scorer.replicas} scorers and {generator.replicas} generators"
    return "" if scorer.placement == generator.placement else "their placement differs"


def roles_of(run: Run, accelerator: Accelerator) -> tuple[RoleRequest, ...]:
    """The actors of a run."""
    roles = [RoleRequest(STUDENT, run.student.ranks, accelerator, constraints=run.student.placement)]
    for name, asked in started_roles(run).items():
        for role, replicas in asked.items():
            if role == GENERATOR and writes_beside(run, name, accelerator):
                continue
            request = RoleRequest(
                actors_of(role, prefix_of(run, name)),
                replicas.replicas,
                CPU if isinstance(replicas.engine, FromStore) else accelerator,
                shards=replicas.tensor_parallel_size,
                constraints=replicas.placement,
                may_span_nodes=replicas.may_span_nodes,
            )
            roles.append(request)
    if (rollouts := rollouts_of(run)) is not None:
        roles.append(
            RoleRequest(
                ROLLOUT,
                rollouts.replicas,
                accelerator,
                shards=rollouts.tensor_parallel_size,
                constraints=rollouts.placement,
                may_span_nodes=rollouts.may_span_nodes,
            )
        )
    return tuple(roles)


def prefix_of(run: Run, teacher: str) -> str:
    """What the names of a teacher's processes begin with: nothing where it is the only one."""
    return teacher if run.teachers else ""
