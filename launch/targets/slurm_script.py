"""What `--to slurm` takes, and the batch script made of it (`slurm.sbatch.jinja`). Pure."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.refusal import refusal
from configs.section import Section
from launch.targets.common import Line, Python, ray_environment, train_command
from launch.targets.common import render as render_template
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from launch.bundle import Bundle

MARK = "stillhouse:"  # before our job id in the comment of a Slurm job
SAFE_FOLDER = r"/[A-Za-z0-9_.,@+=/-]*"
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@%+/=-]+$")]

TIME = r"^(\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2})$"


class Options(Section):
    """What the job asks Slurm for, and how its nodes are set up."""

    nodes: PositiveInt | None = Field(None, description="Nodes of the job; needed to submit.")
    time: Annotated[str, Field(pattern=TIME)] | PositiveInt | None = Field(
        None, description="Time limit as sbatch takes it: minutes, or hours:minutes:seconds, or days-hours."
    )
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    gpus_per_node: Annotated[str, Field(pattern=r"^([A-Za-z0-9_.-]+:)?[1-9]\d*$")] | PositiveInt | None = Field(
        None, description="Number, or kind and number: h100:8."
    )
    cpus_per_node: PositiveInt | None = Field(None, description="None: whole nodes (--exclusive).")
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | PositiveInt | None = Field(
        None, description="Of each node, for example 64G; None: all of a whole node, else the site's default."
    )
    grace_s: PositiveInt = Field(
        180, description="Before the time limit the run saves and ends; a checkpoint must fit."
    )
    requeue: bool = Field(False, description="Queue again after exit 75 (saved before the limit) and 4.")
    max_failures: NonNegativeInt = Field(2, description="With requeue: exits with 4 that are queued again.")
    python: Python | None = Field(
        None, description="Python on the nodes, with the packages of Stillhouse; None: the one that submits."
    )
    slots_per_node: PositiveInt | None = Field(
        None, description="Roles without GPUs that one node holds; None: as many as it has CPUs."
    )
    object_store_bytes: PositiveInt | None = Field(None, description="Of Ray on each node; None: Ray's choice.")
    start_timeout_s: PositiveInt = Field(600, description="Until Ray's head must answer.")
    setup: tuple[Line, ...] = Field((), description="Shell lines before anything starts, such as module load cuda.")
    extra: tuple[Annotated[str, Field(pattern=r"^--?[A-Za-z][^\r\n]*$")], ...] = Field(
        (), description="More options of sbatch, such as --constraint=ib."
    )

    @model_validator(mode="after")
    def _the_limit_leaves_time(self) -> Options:
        limit = limit_s(self.time) if self.time is not None else None
        if limit is not None and limit <= self.grace_s:
            text = f"the time limit of {limit} s is over before the run is told to save: write less than {limit}"
            raise refusal(("grace_s",), self.grace_s, text)
        return self


def limit_s(time_limit: str | int) -> int | None:
    """Seconds of a time limit as sbatch reads it; 0 is none."""
    days, _, rest = str(time_limit).rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None


def submission_folder(bundle: Bundle, job: str) -> Path:
    """Where the job is sent. Raises `ConfigError` for a path that #SBATCH lines cannot hold."""
    assert bundle.run.folder is not None
    folder = bundle.run.folder / "submissions" / job
    if not re.fullmatch(SAFE_FOLDER, str(folder)):
        raise ConfigError(
            f"folder: {bundle.run.folder} has characters that the file names of sbatch cannot hold (only letters, "
            "digits and _.,@+=/- may be in it): name another with --set folder=/shared/runs/NAME"
        )
    return folder


def render(bundle: Bundle, options: Options, job: str) -> str:
    """The batch script."""
    ray_options = _ray_options(options)
    return render_template(
        "slurm.sbatch.jinja",
        run=bundle.run.name,
        comment=MARK + job,
        folder=str(submission_folder(bundle, job)),
        resources=_resources(options),
        ray_options=f" -- {shlex.join(ray_options)}" if ray_options else "",
        ray_environment=ray_environment(),
        train=shlex.join(train_command(bundle.run, job)),
        **options.model_dump(exclude={"python"}),
        python=options.python or sys.executable,
    )


def _resources(options: Options) -> list[str]:
    lines = {
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_node,
        "mem": options.memory,
    }
    found = [f"--{name}={value}" for name, value in lines.items() if value is not None]
    if options.cpus_per_node is None:
        found += ["--exclusive"] + ([] if options.memory is not None else ["--mem=0"])
    return found


def _ray_options(options: Options) -> list[str]:
    """What Ray books on each node: what the job was given, and not what the machine has."""
    gpus = options.gpus_per_node
    found = {
        "num-cpus": options.slots_per_node or options.cpus_per_node,
        "num-gpus": None if gpus is None else str(gpus).rpartition(":")[2],
        "object-store-memory": options.object_store_bytes,
    }
    return [f"--{name}={value}" for name, value in found.items() if value is not None]
