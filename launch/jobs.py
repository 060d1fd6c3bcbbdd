"""Records of submitted jobs, and the status of a job as its run folder shows it.

A record lies beside the run on the machine it was submitted from, `runs/<name>/submission.json`, so that later commands
need the run's name and nothing else. It holds no secret, and only its owner can read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from configs.paths import named_path
from configs.refusal import did_you_mean
from configs.secrets import without_secrets
from launch.files import copy_files
from launch.report.artifacts import read_manifest
from launch.report.hours import LEFT, hours_text, left_text, read_attempts
from launch.targets import JobRecord, RunStatus
from trainer.errors import ConfigError, InfrastructureError
from trainer.records import ignore, read_record
from trainer.run_folder import Ending, RunFolder, write_json

T = TypeVar("T")

RUNS = Path("runs")
RECORD = "submission.json"

ARTIFACTS = (
    *("report.html", "metrics.jsonl", "exit.json", "manifest.json", "config.yaml", "timeline.jsonl"),
    *("samples.json", "generations.json", "rejected.jsonl"),
)
FETCHED = (*ARTIFACTS, "student")
"""What `fetch` brings from a run folder, where it is there: files, and one folder."""

METRICS_LINES = 50
_STEP = re.compile(r'"kind": "step", "step": (\d{1,18})\b')
_MAX_REASON = 1000


def new_job(run_name: str) -> str:
    """An id for one submission: lower-case letters, digits and dashes, at most 50, as every scheduler allows."""
    stem = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")[:28].rstrip("-") or "run"
    return f"{stem}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def record_folder(run_name: str) -> Path:
    """Where the record of a run and what was fetched of it lie on this machine."""
    return (RUNS / run_name).absolute()


def write_record(record: JobRecord) -> Path:
    """Keep a record, mode 0600, in place of an older one of the same run; returns its file."""
    folder = record_folder(record.name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(folder / RECORD, asdict(record))
    return folder / RECORD


def read_job(file: Path) -> JobRecord:
    """Raises `ConfigError` for a file that is no record."""
    try:
        return read_record(file, JobRecord)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{error}. It is no record of a submitted job; submit the run again") from None


def look_up(run: str) -> JobRecord | None:
    """The last submission of a run, by its name or its run folder; None where none is remembered here."""
    place = named_path("RUN", run)
    for folder in (place, RUNS / run):
        if (folder / RECORD).is_file():
            return read_job(folder / RECORD)
    return next((record for record in all_records() if record.folder == str(place.absolute())), None)


def find_record(run: str) -> JobRecord:
    """As `look_up`. Raises `ConfigError` where there is none."""
    record = look_up(run)
    if record is not None:
        return record
    place = named_path("RUN", run)
    for folder in (place, RUNS / run):
        if (folder / "config.yaml").is_file():
            raise ConfigError(
                f"{folder} was made by `stillhouse train`, so there is no job of it: stillhouse status {run} says how "
                "it stands, Ctrl-C in its terminal saves and stops it, and its results lie there already"
            )
    names = [record.name for record in all_records()]
    known = f" (submitted from here: {', '.join(names)})" if names else ""
    raise ConfigError(
        f"no job was submitted from here for the run {run}: neither {place / RECORD} nor {RUNS / run / RECORD} exists"
        f"{did_you_mean(run, names) or known}. Jobs of a cluster: stillhouse list --to KIND"
    )


def all_records(*, tell: Callable[[str], None] = ignore) -> list[JobRecord]:
    """Every submission remembered here, newest first; `tell` gets a sentence for each file that is no record."""
    found = []
    for file in RUNS.glob(f"*/{RECORD}"):
        try:
            found.append(read_job(file))
        except ConfigError as error:
            tell(str(error))
    return sorted(found, key=lambda record: record.submitted, reverse=True)


# --- status from a run folder ----------------------------------------------------------------------------------------


def ending_file(run: Path, job: str) -> Path:
    """Where the command of a job notes how it ended, in the run folder: `launch train --ending FILE`."""
    return run / "submissions" / job / "exit.json"


def note_ending(file: Path, code: int, reason: str) -> None:
    """Write such a file, where it can be written: the exit code itself is more important."""
    said = without_secrets(reason, environment=os.environ)
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(file, asdict(Ending(code, said, time.time())))


def run_status(run: Path, job: str) -> RunStatus:
    """Of a job, from its run folder or a copy of some of its files."""
    folder = RunFolder(run)
    ending = readable(lambda: read_record(ending_file(run, job), Ending))
    step, steps = steps_of(folder)
    if ending is None:
        return RunStatus(step, steps, pace=pace_of(folder))
    return RunStatus(step, steps, ending.code, ending.reason[:_MAX_REASON] if ending.code else "")


def steps_of(folder: RunFolder) -> tuple[int | None, int | None]:
    """(last step trained, steps in all), each where it is known."""
    step = next(iter(reversed(_STEP.findall(last_lines(folder.metrics)))), None)
    return (None if step is None else int(step)), read_manifest(folder).get("total_steps")


def pace_of(folder: RunFolder) -> str:
    """`ETA 1 h 05 min, 3.2 of 41 GPU-hours`, by the last step; "" where that does not say it."""
    line = next((text for text in reversed(last_lines(folder.metrics).splitlines()) if _STEP.search(text)), "{}")
    attempts = read_attempts(read_manifest(folder))
    try:
        values = json.loads(line)
    except ValueError:
        return ""
    if not attempts or not isinstance(values.get(LEFT), int | float):
        return ""
    return ", ".join(filter(None, (left_text(values), hours_text(values, attempts[-1].kind))))


def last_lines(file: Path, *, max_bytes: int = 64 * 1024) -> str:
    """The end of a text file, from a line's beginning; "" where none can be read."""
    try:
        with file.open("rb") as content:
            size = content.seek(0, 2)
            content.seek(max(0, size - max_bytes))
            text = content.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return text if size <= max_bytes else text.partition("\n")[2]


# --- run folders ------------------------------------------------------------------------------------------------------


def visible_folder(record: JobRecord) -> Path | None:
    """The job's run folder, where this machine sees the same one: it holds something that the job wrote.

    A folder of that path may also be this machine's own, so that existing is not enough.
    """
    folder = Path(record.folder)
    began = read_manifest(RunFolder(folder)).get("started") or 0.0
    return folder if began > record.submitted or ending_file(folder, record.job).exists() else None


def readable(read: Callable[[], T]) -> T | None:
    """What a file of a run folder says; None where it cannot be read."""
    try:
        return read()
    except (OSError, ConfigError):
        return None


def copy_results(source: Path, destination: Path) -> None:
    """Copy what `fetch` brings from a run folder of this machine. Raises `InfrastructureError` where there is none."""
    if not source.is_dir():
        raise InfrastructureError(f"the run folder {source} does not exist here (yet)")
    if source.resolve() == destination.resolve():
        return
    refuse_run_folder(destination)
    draft = new_draft(destination)
    copy_files(source, draft, subject="fetch", names=FETCHED)
    put_in_place(draft, destination)


def refuse_run_folder(destination: Path) -> None:
    """Raises `ConfigError` where the destination is the folder of a run that was made on this machine."""
    if (destination / "checkpoints").exists():
        raise ConfigError(
            f"{destination} holds a run of this machine (it has checkpoints), which fetching would overwrite: name "
            "another folder with --into FOLDER"
        )


def new_draft(destination: Path) -> Path:
    """An empty folder beside the final files, so that a transfer that breaks off leaves them as they were."""
    draft = destination / ".fetching"
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(mode=0o700, parents=True)
    return draft


def put_in_place(draft: Path, destination: Path) -> None:
    """Move everything in a draft to where it belongs, in place of what was there, and remove the draft."""
    for item in sorted(draft.iterdir()):
        target = destination / item.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        item.replace(target)
    draft.rmdir()


# --- waiting ----------------------------------------------------------------------------------------------------------


def waited_too_long(what: str, seconds: float, *, instead: str) -> InfrastructureError:
    """For a wait that passed its deadline."""
    return InfrastructureError(f"{what} did not end within {seconds:g} s. {instead}")


def is_fetched(name: str, known: Iterable[str] = FETCHED) -> bool:
    """Whether a path relative to a run folder is among what `fetch` brings, and stays inside it."""
    parts = Path(name).parts
    return bool(parts) and parts[0] in known and ".." not in parts and not Path(name).is_absolute()
