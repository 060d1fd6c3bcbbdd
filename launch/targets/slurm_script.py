"""The batch script of `--to slurm`: from options to text. Pure; the script itself is `slurm.sbatch.jinja`."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from launch.bundle import Bundle
from launch.targets.common import ray_environment, train_command
from launch.targets.common import render as render_template
from launch.targets.slurm_options import Options
from trainer.errors import ConfigError

MARK = "stillhouse:"  # before our job id in the comment of a Slurm job
SAFE_FOLDER = r"/[A-Za-z0-9_.,@+=/-]*"


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
