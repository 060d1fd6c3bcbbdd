"""What `--to slurm` takes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.refusal import refusal
from configs.section import Section
from launch.targets.common import Line, Python

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
