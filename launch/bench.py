"""`stillhouse bench`: the throughput of a run and where its time went, from the records in its run folder.

A run on a cluster is measured as it is: train some steps of the configuration in question, then ask these commands.
The comparisons of this project with other software are in `benchmarks/` of its repository. Nothing heavy is imported
before a command runs, so help comes at once.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

bench_app = typer.Typer(
    help="Measure a run: speed, waiting, start-up. docs/benchmarks.md says how to read it.", no_args_is_help=True
)

RunFolderOption = Annotated[
    Path, typer.Option("--run", metavar="RUN", exists=True, file_okay=False, help="Folder of a run.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write every number as JSON too.")]


@bench_app.command(epilog="Example: stillhouse bench start --run runs/demo")
def start(run: RunFolderOption, out: Out = None) -> None:
    """What the time from the command to the first trained step was made of, from a run's own records."""
    from rich.console import Console

    from launch.report.run_times import start_phases, start_table
    from trainer.run_folder import RunFolder

    phases = start_phases(RunFolder(run))
    Console().print(start_table(phases))
    write_numbers(out, {"phases_s": {phase.name: phase.seconds for phase in phases}})


@bench_app.command(epilog="Example: stillhouse bench waits --run runs/demo")
def waits(run: RunFolderOption, out: Out = None) -> None:
    """Tokens per second, and busy and waiting shares of student and teachers, at steady state."""
    from dataclasses import asdict

    from rich.console import Console

    from launch.report.run_times import read_waits, waits_table
    from trainer.run_folder import RunFolder

    found = read_waits(RunFolder(run))
    Console().print(waits_table(found))
    lanes = [asdict(share) for share in found.shares]
    write_numbers(out, {"depth": found.depth, "tokens_per_s": found.tokens_per_s, "lanes": lanes})


def write_numbers(out: Path | None, numbers: dict[str, Any]) -> None:
    """As JSON, with what is needed to repeat them: command, date, versions, processor, revision. None: not at all."""
    if out is None:
        return
    from launch.report.environment import manifest_environment
    from trainer.run_folder import plain

    made = {"command": list(sys.orig_argv), "time": time.time(), **manifest_environment()}
    out.write_text(json.dumps(plain({**made, **numbers}), indent=1) + "\n", encoding="utf-8")
    typer.echo(f"written: {out}")
