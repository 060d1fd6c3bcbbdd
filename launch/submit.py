"""`stillhouse submit` and what follows it: status, logs, stop, list, fetch.

The commands know targets only by their protocol (`launch/targets/__init__.py`); what is particular to a scheduler lies
in the target's own file.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from configs.load import load_section
from launch import foreground
from launch.bundle import Bundle, make_bundle
from launch.jobs import all_records, find_record, look_up, new_job, record_folder, write_record
from launch.targets import JobRecord, JobStatus, Shipment, Target, load_target
from trainer.errors import InfrastructureError, StillhouseError, without_controls
from trainer.imports import uncollected

INTERRUPTED = 130
COLOURS = {
    "pending": typer.colors.YELLOW,
    "running": typer.colors.CYAN,
    "succeeded": typer.colors.GREEN,
    "failed": typer.colors.RED,
    "stopped": typer.colors.YELLOW,
    "preempted": typer.colors.YELLOW,
    "unknown": typer.colors.MAGENTA,
}

NEXT_COMMANDS = (
    ("logs -f", "watch it"),
    ("status", "how far it is"),
    ("stop", "save a checkpoint and end"),
    ("fetch", "bring report and student here"),
)
STATUS_ATTEMPTS, STATUS_WAIT_S = 4, 3.0


@dataclass(frozen=True, slots=True)
class Destination:
    """A target as a command line names it."""

    kind: str  # --to
    given: Sequence[str] = ()  # --with
    file: Path | None = None  # --target-file

    def load(self) -> tuple[Target, Any]:
        """The target and its options. Raises `ConfigError` for an unknown kind, and for all wrong options at once."""
        target, title = load_target(self.kind), f"options of --to {self.kind}"
        return target, load_section(target.Options, self.file, self.given, title=title, option="--with")


def submit(
    config: Path,
    overrides: Sequence[str],
    destination: Destination,
    *,
    dry_run: bool,
    follow: bool,
    max_bytes: int,
    shared: Sequence[Path],
    checks: bool = True,
) -> int:
    """Send a run to a target, after a look at it as `check` has it. Returns 0, that of `check` where nothing was sent,
    or with `follow` the exit code of the run itself."""
    target, options = destination.load()
    if checks and (code := _look(config, overrides, destination.kind, target, options)):
        return code
    with tempfile.TemporaryDirectory(prefix="stillhouse-bundle-") as folder:
        bundle = make_bundle(
            config, list(overrides), folder=Path(folder) / "bundle", max_bytes=max_bytes, shared=shared
        )
        job = new_job(bundle.run.name)
        shipment = target.prepare(bundle, options, job)
        for warning in shipment.warnings:
            _warn(warning)
        if dry_run:
            typer.echo(describe(bundle, shipment, kind=destination.kind, job=job))
            return 0
        record = target.submit(bundle, shipment, options, job)
    write_record(record)
    typer.echo(f"submitted {record.job} to {record.kind} ({bundle.num_bytes / 2**20:.1f} MiB sent)")
    for line in left_out_lines(bundle):
        typer.echo(line)
    if follow:
        return follow_job(record)
    for command, purpose in NEXT_COMMANDS:
        typer.echo(f"  stillhouse {command} {record.name:<20}  {purpose}")
    return 0


def _look(config: Path, overrides: Sequence[str], kind: str, target: Target, options: Any) -> int:
    with uncollected():
        from launch.check.run import check_to_send  # here: it imports what the other commands do without
        from launch.check.there import HERE, There

    if kind == "local":
        return check_to_send(config, overrides, HERE)
    offered = getattr(target, "offer", None)  # a target of somebody else's may have none
    return check_to_send(config, overrides, There(elsewhere=True, offer=offered(options) if offered else None))


def status(run: str) -> int:
    """Print how a run is doing: its last job, or what was started in the foreground. Returns its own exit code once it
    is over, else 0."""
    record, here = look_up(run), foreground.find_run(run)
    if record is None and here is not None:
        return _tell(foreground.status_of(here), foreground.KIND, here.path)
    record = record or find_record(run)
    found = load_target(record.kind).status(record)
    if found.over and here is not None and (now := foreground.status_of(here)).state == "running":
        return _tell(now, foreground.KIND, here.path)
    return _tell(found, record.kind, record.folder)


def logs(run: str, *, follow: bool) -> int:
    """Print the driver's output. With `follow` until the job is over, and its exit code is returned."""
    record = find_record(run)
    if follow:
        return follow_job(record)
    _print_all(load_target(record.kind).logs(record, follow=False))
    return 0


def stop(run: str) -> int:
    """Ask the last job of a run to save and end, and wait until it has."""
    record = find_record(run)
    target = load_target(record.kind)
    if not target.status(record).over:
        typer.echo(f"asked {record.job} to save a checkpoint and end; waiting for it (Ctrl-C ends only the waiting)")
        try:
            target.stop(record)
        except KeyboardInterrupt:
            typer.echo(f"\n{record.job} is still ending: stillhouse status {record.name}", err=True)
            return INTERRUPTED
    _tell(target.status(record), record.kind, record.folder)
    return 0


def list_jobs(destination: Destination | None = None) -> int:
    """Print one line a job: of a scheduler, or without `destination` of every run submitted from or made in this
    folder."""
    if destination is not None:
        target, options = destination.load()
        found = [(destination.kind, status) for status in target.list(options)]
    else:
        found = [(record.kind, _status_or_reason(record)) for record in all_records(tell=_warn)]
        found += [(foreground.KIND, foreground.status_of(folder)) for folder in foreground.runs_here()]
    found.sort(key=lambda line: -(line[1].submitted or 0))
    if not found:
        typer.echo(
            "no jobs" if destination else "no runs in runs/, and none submitted from here; of a scheduler: --to KIND"
        )
    for of_kind, status in found:
        typer.secho(f"{status.state:<10}", fg=COLOURS[status.state], nl=False)
        steps = f"{status.step}/{status.steps}" if status.step is not None else ""
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.submitted)) if status.submitted else ""
        code = "" if status.exit_code is None else f"exit {status.exit_code}"
        note = "" if status.state == "running" else _first_line(status.message)
        line = f"{of_kind:<9} {began:<17} {status.name:<20} {status.job:<32} {steps:<11} {code:<8} {note}"
        typer.echo(f"  {line}".rstrip())
    return 0


def fetch(run: str, into: Path | None) -> int:
    """Bring the results of a run to a folder here: `runs/<name>` unless another is named."""
    record = find_record(run)
    destination = (into or record_folder(record.name)).absolute()
    load_target(record.kind).fetch(record, destination)
    for name, purpose in (("report.html", "report"), ("student", "student"), ("metrics.jsonl", "metrics")):
        if (destination / name).exists():
            typer.echo(f"{purpose:<9} {destination / name}")
    return 0


def describe(bundle: Bundle, shipment: Shipment, *, kind: str, job: str) -> str:
    """What would be sent, exactly: every text in full, every file by its place and size."""
    lines = [f"--to {kind}, job {job}: nothing was started. {shipment.note}", ""]
    if shipment.command:
        lines += [f"command   {' '.join(shipment.command)}", ""]
    for name, content in shipment.files.items():
        if isinstance(content, str):
            lines += [f"----- {name} -----", content.rstrip("\n"), ""]
            continue
        lines.append(f"----- {name}{'/' if content.is_dir() else ''} -----")
        lines += [*_listing(content), ""]
        if content.is_relative_to(bundle.folder) and (content / "run.yaml" if content.is_dir() else content).is_file():
            text = content / "run.yaml" if content.is_dir() else content
            lines += [f"----- {text.relative_to(bundle.folder)} -----", text.read_text().rstrip("\n"), ""]
    lines += left_out_lines(bundle)
    lines.append(f"{bundle.num_bytes / 2**20:.1f} MiB in {len(bundle.files)} files; code {bundle.build}")
    return "\n".join(lines)


def left_out_lines(bundle: Bundle) -> list[str]:
    """What of the rows stays here or is not here: files in folders that cannot hold rows; URLs and names of the hub."""
    names = ", ".join(bundle.left_out[:5]) + (", ..." if len(bundle.left_out) > 5 else "")
    left_out = [f"not sent, no files of rows: {names}"] if bundle.left_out else []
    return [*left_out, *([f"the nodes must reach: {', '.join(bundle.fetched)}"] if bundle.fetched else [])]


def _listing(path: Path) -> Iterator[str]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        yield f"{file.stat().st_size:>12,}  {name}"


def follow_job(record: JobRecord) -> int:
    """Print the output until the job is over; returns the run's own exit code. Ctrl-C stops only the printing."""
    target = load_target(record.kind)
    try:
        _print_all(target.logs(record, follow=True))
        found = _status_in_the_end(record)
    except KeyboardInterrupt:
        typer.echo(
            f"\n{record.job} goes on unwatched: stillhouse logs -f {record.name}, stillhouse stop {record.name}",
            err=True,
        )
        return INTERRUPTED
    return _tell(found, record.kind, record.folder)


def exit_code(found: JobStatus) -> int:
    """The run's own exit code where it is known; of a job that never had one, that of `InfrastructureError`."""
    if not found.over:
        return 0
    if found.exit_code is not None:
        return found.exit_code
    return {"succeeded": 0, "stopped": INTERRUPTED}.get(found.state, InfrastructureError.exit_code)


def _tell(found: JobStatus, kind: str, folder: Path | str) -> int:
    """Print how a run stands, and return its exit code."""
    typer.secho(found.state, fg=COLOURS[found.state], nl=False)
    code = "" if found.exit_code is None else f", exit code {found.exit_code}"
    steps = "" if found.step is None else f", step {found.step} of {found.steps}"
    job = "" if found.job == "-" else f": {found.job}"
    pace = f", {found.pace}" if found.pace else ""
    typer.echo(f"{code}{steps}{pace}{job} ({kind}), run folder {folder}")
    if found.message:
        typer.echo(without_controls(found.message))
    return exit_code(found)


def _status_or_reason(record: JobRecord) -> JobStatus:
    """A job that cannot be asked is a line of the list too, and does not hide the others."""
    try:
        return load_target(record.kind).status(record)
    except StillhouseError as error:
        text = f"cannot be asked: {error}"
        return JobStatus(record.job, "unknown", message=text, name=record.name, submitted=record.submitted)


def _status_in_the_end(record: JobRecord) -> JobStatus:
    """Of a job that was followed until now, asked several times: one slow answer must not hide the exit code."""
    for _ in range(STATUS_ATTEMPTS - 1):
        try:
            return load_target(record.kind).status(record)
        except StillhouseError:
            time.sleep(STATUS_WAIT_S)
    return load_target(record.kind).status(record)


def _warn(text: str) -> None:
    typer.secho(f"warning: {text}", fg=typer.colors.YELLOW, err=True)


def _print_all(pieces: Iterator[str]) -> None:
    """On a terminal without control characters; into a file or a pipe as the job wrote it."""
    shown = without_controls if sys.stdout.isatty() else str
    for piece in pieces:
        typer.echo(shown(piece), nl=False)


def _first_line(text: str) -> str:
    return next(iter(without_controls(text).splitlines()), "")[:120]
