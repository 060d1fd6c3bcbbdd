"""From a configuration and machines to everything a run decides from them, as a pure function.

    Run + RunFacts + Hardware -> accelerator, dtypes -> placement -> choices -> plan of every role -> Resolved

No model folder is read and nothing is started, so the settings of an eight-GPU node are tested as golden files on a
laptop. Whatever is chosen for the user says so in `reasons`; whatever they should know, in `warnings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.engines.plan import EnginePlan
from cluster.engines.vllm_limits import check_cache, check_rotation, check_split
from cluster.placement.choices import Choices, DtypeRule, choose_accelerator
from cluster.placement.facts import RunFacts
from cluster.placement.groups import Placement
from cluster.placement.hardware import Hardware
from cluster.placement.plans import (
    TeacherPlans,
    rollout_plan,
    student_plan,
    teacher_plans,
    unused_window,
    wanted_dtypes,
)
from cluster.placement.roles import apart_because, roles_of, started_roles
from cluster.placement.topology import place
from cluster.runtime import CPU, GENERATOR, GPU, STUDENT, Accelerator
from configs.rules import teacher_place
from configs.schema import Run
from trainer.types import StudentPlan


@dataclass(frozen=True, slots=True)
class Resolved:
    """All that follows from a run and its machines."""

    accelerator: Accelerator
    student: StudentPlan
    student_environment: Mapping[str, str]  # of every rank's process; `student_environment` of runtime.py adds the rank
    teachers: Mapping[str, TeacherPlans]  # by name; without those that no task asks
    rollouts: EnginePlan | None  # of the engines that hold the student; None where it writes nothing
    placement: Placement
    reasons: tuple[str, ...]  # one line for each choice made for the user
    warnings: tuple[str, ...]

    @property
    def engines(self) -> tuple[EnginePlan, ...]:
        """Of all teachers, and of the student's rollouts."""
        own = () if self.rollouts is None else (self.rollouts,)
        return (*(plan for plans in self.teachers.values() for plan in plans.started), *own)

    @property
    def teacher_dtypes(self) -> dict[str, str]:
        """What the labels of each teacher are made in."""
        return {name: plans.started[0].dtype for name, plans in self.teachers.items()}


def resolve(run: Run, hardware: Hardware, facts: RunFacts, *, with_students: bool = True) -> Resolved:
    """Decide everything that depends on the machines. Raises `ConfigError` where they do not allow the run.

    `with_students`: whether there is to be room for them.
    """
    for name, teacher in facts.teachers.items():
        if teacher.config is not None:
            check_split(run, name, teacher.config)
            check_rotation(run, name, teacher.config)
            check_cache(run, name, teacher.config)
    accelerator = choose_accelerator(run, hardware)
    roles = [role for role in roles_of(run, accelerator) if with_students or role.role != STUDENT]
    placement = Placement() if run.runtime == "in_process" else place(roles, hardware)
    choices = Choices(run, facts, hardware, accelerator, placement, DtypeRule.of(hardware, accelerator))
    return Resolved(
        accelerator=accelerator,
        student=student_plan(choices),
        student_environment=choices.environment(STUDENT),
        teachers={name: teacher_plans(choices, name) for name in started_roles(run)},
        rollouts=rollout_plan(choices),
        placement=placement,
        reasons=tuple(_reasons(choices)),
        warnings=tuple(_warnings(choices)),
    )


def _reasons(choices: Choices) -> Iterator[str]:
    run = choices.run
    how = "as configured" if run.accelerator != "auto" else choices.hardware.describe()
    yield f"accelerator: {choices.accelerator} ({how})"
    yield from filter(None, (choices.dtypes.reason(role, dtype) for role, dtype in wanted_dtypes(run)))
    yield from filter(None, (unused_window(choices, name) for name in started_roles(run)))
    for name, asked in started_roles(run).items():
        generator = asked.get(GENERATOR)
        if generator is not None and generator.beside_scorer and (why := apart_because(run, name, choices.accelerator)):
            yield f"{teacher_place(run, name)}.generator: in processes of its own, not beside the scorer: {why}"


def _warnings(choices: Choices) -> Iterator[str]:
    hardware, placement = choices.hardware, choices.placement
    if choices.accelerator == CPU and placement.num_slots > hardware.num_cpus:
        yield (
            f"{placement.num_slots} processes share {hardware.num_cpus} cores: they take turns, which is slower but "
            "not wrong"
        )
    unbound = any(group.gpu_kind is None for group in placement.of_role(STUDENT))
    if choices.accelerator == GPU and len(hardware.gpu_kinds) > 1 and unbound:
        kinds = ", ".join(hardware.gpu_kinds)
        yield f"no kind of GPU ({kinds}) can hold all student ranks: every step waits for the slowest kind"
    yield from filter(None, (choices.dtypes.warning(role, dtype) for role, dtype in wanted_dtypes(choices.run)))
