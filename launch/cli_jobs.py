"""The commands `stillhouse submit` and what follows it: status, logs, stop, list, fetch (`launch/submit.py`).

Every command imports what it needs inside its function, as in `launch/cli.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

job_app = typer.Typer()

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Set one value, as YAML; may be given several times."),
]
Kind = Annotated[
    str,
    typer.Option(
        "--to", metavar="KIND", help="Where it runs: local, ray, slurm, kuberay, skypilot (launch/targets/<kind>.py)."
    ),
]
OptionalKind = Annotated[str | None, typer.Option("--to", metavar="KIND", help="Ask this scheduler for all its jobs.")]
TargetOptions = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="A=B", help="Set one option of the target, as YAML; may be given several times."),
]
TargetFile = Annotated[
    Path | None, typer.Option("--target-file", metavar="FILE", help="YAML file with options of the target.")
]
Shared = Annotated[
    list[Path] | None,
    typer.Option(
        "--shared", metavar="FOLDER", help="Every node sees it at the same path: rows in it are not uploaded."
    ),
]
MaxUpload = Annotated[float, typer.Option("--max-upload", metavar="MIB", min=0, help="Refuse to send more than this.")]
JobRun = Annotated[str, typer.Argument(metavar="RUN", help="Name or run folder of a run submitted from this folder.")]
AnyRun = Annotated[str, typer.Argument(metavar="RUN", help="Name or run folder of a run of this folder.")]


@job_app.command(
    epilog="Examples: stillhouse submit configs/demo.yaml --to local --follow · "
    "stillhouse submit run.yaml --to ray --with address=http://head:8265 · "
    "stillhouse submit run.yaml --to slurm --target-file site.yaml --dry-run"
)
def submit(
    config: Config,
    kind: Kind,
    overrides: Overrides = None,
    given: TargetOptions = None,
    target_file: TargetFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print exactly what would be sent; start nothing.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print its output until it ends, and return its exit code.")
    ] = False,
    shared: Shared = None,
    max_upload: MaxUpload = 100,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Send it without looking at models, rows and memory first.")
    ] = False,
) -> None:
    """Send a run to a cluster, a scheduler or the background, with the code and the rows that lie here.

    First it is looked at as `stillhouse check` does, as far as this machine sees. Nothing needs to be installed there
    but the packages that Stillhouse uses. The same command again resumes the run.
    """
    from launch.submit import Destination
    from launch.submit import submit as send

    code = send(
        config,
        overrides or [],
        Destination(kind, given or [], target_file),
        dry_run=dry_run,
        follow=follow,
        max_bytes=int(max_upload * 2**20),
        shared=shared or [],
        checks=not no_check,
    )
    raise typer.Exit(code)


@job_app.command(epilog="Example: stillhouse status demo")
def status(run: AnyRun) -> None:
    """Say how a run is doing: its last submitted job, or what `stillhouse train` makes here.

    Exit code 0 while it waits or runs, then that of the run itself.
    """
    from launch.submit import status as show

    raise typer.Exit(show(run))


@job_app.command(epilog="Example: stillhouse logs -f demo")
def logs(
    run: JobRun,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends; return its code.")] = False,
) -> None:
    """Print the output of the last submitted job of a run."""
    from launch.submit import logs as show

    raise typer.Exit(show(run, follow=follow))


@job_app.command(epilog="Example: stillhouse stop demo")
def stop(run: JobRun) -> None:
    """Have a job save a checkpoint and end, and wait until it has. Submitting the run again resumes it."""
    from launch.submit import stop as ask

    raise typer.Exit(ask(run))


@job_app.command("list", epilog="Examples: stillhouse list · stillhouse list --to ray --with address=http://head:8265")
def list_(kind: OptionalKind = None, given: TargetOptions = None, target_file: TargetFile = None) -> None:
    """List the runs of this folder, or with --to all jobs of Stillhouse that a scheduler knows."""
    from launch.submit import Destination, list_jobs

    raise typer.Exit(list_jobs(None if kind is None else Destination(kind, given or [], target_file)))


@job_app.command(epilog="Example: stillhouse fetch demo --into results/demo")
def fetch(
    run: JobRun,
    into: Annotated[
        Path | None, typer.Option("--into", metavar="FOLDER", help="Where to; default runs/<name of the run>.")
    ] = None,
) -> None:
    """Bring report, metrics and student of a submitted run from where it ran to a folder here."""
    from launch.submit import fetch as bring

    raise typer.Exit(bring(run, into))
