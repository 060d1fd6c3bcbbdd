"""What `check` asks of the places of a run: which devices it wants, how its models are split and copied, its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.engines.vllm_limits import check_split
from cluster.placement.roles import rollouts_of, started_roles, writes_beside
from cluster.preflight.finding import Finding, attempt, ok, problem
from cluster.preflight.machine import writable
from cluster.runtime import CPU, GENERATOR, Role, actors_of
from configs.load import run_folder
from configs.models import ModelSource, Replicas
from configs.paths import refuse_pattern
from configs.rules import teacher_place
from configs.schema import Run, Training
from launch.disk import DiskNeed
from launch.model_folder import ModelFacts
from trainer.model.load import load_config


def placement(run: Run, sources: Mapping[str, ModelSource], *, known: set[str]) -> Iterator[Finding]:
    """What the run asks for, and what of the placement follows from the models alone; the rest needs the machines.
    `sources`: of all models, by role."""
    yield ok("devices", devices_text(run))
    for name, teacher in run.teachers_by_name().items():
        place = teacher_place(run, name)
        sizes = {role: replicas.tensor_parallel_size for role, replicas in teacher.roles().items()}
        if place in known and max(sizes.values()) > 1:
            text = ", ".join(f"{role} in {size} parts" for role, size in sizes.items())
            look = partial(_split, run, name, teacher.model, f"{place}.model")
            yield attempt(f"{place} split", look, partial(str, text))
    for role, source in sources.items():
        if source.local_copy is not None and not Path(source.path).expanduser().is_dir():
            text = f"{role}.model.local_copy copies a folder, and {source.path} is none here; the hub has its own cache"
            yield problem(f"{role} copy", text)


def _split(run: Run, name: str, source: ModelSource, role: str) -> None:
    check_split(run, name, load_config(source, role=role))


def devices_text(run: Run) -> str:
    """`16 GPUs, or as many cores where there is no GPU: student 8, scorer 2 x 4`."""
    if run.runtime == "in_process":
        return "one process for student and teacher"
    counts = {"student": (run.student.ranks, 1)}
    for name, roles in started_roles(run).items():
        prefix = name if run.teachers else ""
        counts |= {actors_of(role, prefix): (r.replicas, r.tensor_parallel_size) for role, r in roles.items()}
    if (rollouts := rollouts_of(run)) is not None:
        counts["rollout"] = (rollouts.replicas, rollouts.tensor_parallel_size)
    total = sum(num * size for num, size in counts.values())
    cores = total - sum(r.replicas for name, roles in started_roles(run).items() for r in _beside(run, name, roles))
    parts = ", ".join(f"{role} {num}" + (f" x {size}" if size > 1 else "") for role, (num, size) in counts.items())
    as_many = "as many cores" if cores == total else f"{cores} cores (generators beside their scorers)"
    kinds = {
        "auto": f"{total} GPUs, or {as_many} where there is no GPU",
        "gpu": f"{total} GPUs",
        "cpu": f"{cores} cores",
    }
    return f"{kinds[run.accelerator]}: {parts}"


def _beside(run: Run, name: str, roles: Mapping[Role, Replicas]) -> list[Replicas]:
    return [roles[GENERATOR]] if writes_beside(run, name, CPU) else []


def examine_folder(run: Run, student: ModelFacts | None) -> Iterator[Finding]:
    folder = run_folder(run).absolute()
    named = attempt("run folder", partial(refuse_pattern, "folder", folder, reader="DeepSpeed"), lambda: "")
    found = named if named.fatal else _naming_the_setting(writable("run folder", folder))
    yield found
    yield ok("checkpoints", cost_of_a_crash(run.training))
    if student is None or found.fatal:
        yield Finding("not checked", "disk", "its need follows from the folder and the student's size")
    else:
        yield _naming_the_setting(DiskNeed.of(run, student).look(folder))


def _naming_the_setting(found: Finding) -> Finding:
    return replace(found, text=f"folder: {found.text}") if found.fatal else found


def cost_of_a_crash(training: Training) -> str:
    """What is lost where a run dies without being asked to stop."""
    steps, minutes = training.save_every, training.save_every_minutes
    every = [f"{steps} steps"] * (steps > 0) + [f"{minutes:g} minutes"] * (minutes > 0)
    if not every:
        return "saved at the end and when asked to stop: a crash costs everything trained until then"
    several = ", whichever comes first" if len(every) > 1 else ""
    return f"saved every {' or '.join(every)}{several}: a crash costs at most what was trained in between, and a start"
