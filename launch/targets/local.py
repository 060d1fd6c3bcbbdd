"""`--to local`: the run as a process of its own on this machine, which outlives the terminal.

The process works on a copy of the code under `runs/<name>/jobs/<job>/`, so that editing a checkout while it runs
changes nothing in it. A shell around it notes its exit code.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from pydantic import PositiveInt

from configs.section import Section
from launch.jobs import all_records, copy_results, record_folder, run_status, waited_too_long
from launch.targets import JobRecord, JobStatus, Shipment, options_of, state_of
from launch.targets.common import follow_file, train_command, wait_until, write_files
from trainer.errors import ConfigError
from trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from launch.bundle import Bundle

OUTPUT, EXIT_CODE, STOP_ASKED = "output.log", "exit_code", "stop_asked"

SHELL = f'trap : TERM INT HUP; "$@"; code=$?; echo $code > .{EXIT_CODE}; mv .{EXIT_CODE} {EXIT_CODE}'
"""The shell catches these signals, so that it outlives them and notes the exit code; the child starts with defaults."""

POLL_S = 0.3
LAST_GRACE_S = 60.0


class Options(Section):
    """What `--with` takes."""

    stop_wait_s: PositiveInt = 3600


class Target:
    """See `launch.targets.Target`."""

    Options = Options

    def prepare(self, bundle: Bundle, options: Options, job: str) -> Shipment:
        names = ["run.yaml", "code", *(["prompts"] if (bundle.folder / "prompts").is_dir() else [])]
        folder = _job_folder(bundle.run.name, job)
        return Shipment(
            files={name: bundle.folder / name for name in names},
            command=(sys.executable, *train_command(bundle.run, job)),
            note=f"Runs on this machine, in {folder} with PYTHONPATH={folder / 'code'}, and outlives this terminal. "
            f"Its output goes to {folder / OUTPUT}, its results to {bundle.run.folder}.",
        )

    def submit(self, bundle: Bundle, shipment: Shipment, options: Options, job: str) -> JobRecord:
        assert bundle.run.folder is not None
        _refuse_used(bundle.run.folder)
        folder = _job_folder(bundle.run.name, job)
        record_folder(bundle.run.name).mkdir(mode=0o700, parents=True, exist_ok=True)
        write_files(folder, shipment.files)
        path = os.pathsep.join([str(folder / "code"), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (folder / OUTPUT).open("wb") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", SHELL, "stillhouse", *shipment.command],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = psutil.Process(process.pid).create_time()
        return JobRecord.of(job, "local", bundle, options, handle=f"{process.pid} {started}")

    def status(self, record: JobRecord) -> JobStatus:
        folder = _job_folder(record.name, record.job)
        alive = _process(record) is not None  # before the exit code is read: it is written first
        code = _exit_code(folder)
        written = run_status(Path(record.folder), record.job)
        message = written.reason
        if code is None and not alive:
            code = written.exit_code
            message = message or "its process is gone: killed, or this machine was started again"
        if code is None and alive:
            return record.status("running", written=written)
        state = state_of(code)
        if state != "succeeded" and (folder / STOP_ASKED).exists():
            state = "stopped"
        return record.status(state, code, message="" if state == "succeeded" else message, written=written)

    def logs(self, record: JobRecord, *, follow: bool) -> Iterator[str]:
        file = _job_folder(record.name, record.job) / OUTPUT
        if not file.exists():
            raise ConfigError(f"the output of {record.job} is gone: there is no {file}")
        over = lambda: not follow or self.status(record).over  # noqa: E731
        yield from follow_file(file, over=over, poll_s=POLL_S)

    def stop(self, record: JobRecord) -> None:
        process = _process(record)
        if process is None:
            return
        options = options_of(Target, record)
        (_job_folder(record.name, record.job) / STOP_ASKED).touch()
        _tell(process, signal.SIGTERM)
        if self._ended(record, options.stop_wait_s):
            return
        _tell(process, signal.SIGTERM)  # the second one does not wait for a checkpoint
        if not self._ended(record, LAST_GRACE_S):
            instead = f"End its processes by hand: kill -9 -- -{process.pid}"
            raise waited_too_long(record.job, options.stop_wait_s + LAST_GRACE_S, instead=instead)

    def list(self, options: Options) -> list[JobStatus]:
        return [self.status(record) for record in all_records() if record.kind == "local"]

    def fetch(self, record: JobRecord, destination: Path) -> None:
        copy_results(Path(record.folder), destination)

    def _ended(self, record: JobRecord, seconds: float) -> bool:
        return wait_until(lambda: self.status(record).over, seconds=seconds, poll_s=POLL_S)


def _job_folder(run_name: str, job: str) -> Path:
    return record_folder(run_name) / "jobs" / job


def _refuse_used(folder: Path) -> None:
    """Raises `ConfigError` where another process holds the run folder."""
    if folder.is_dir():
        with RunFolder(folder).lock():
            pass


def _process(record: JobRecord) -> psutil.Process | None:
    """The shell around the job, where it still runs; a later process of the same number is another one."""
    pid, _, started = record.handle.partition(" ")
    if not (pid.isdecimal() and len(pid) < 10 and re.fullmatch(r"\d+(\.\d+)?", started)):
        raise ConfigError(f"the record of {record.job} names no process ({record.handle!r:.60}); submit the run again")
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(started)) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if same else None


def _tell(shell: psutil.Process, number: signal.Signals) -> None:
    """Signal the run itself: it ends what it started."""
    for child in shell.children():
        child.send_signal(number)


def _exit_code(folder: Path) -> int | None:
    try:
        return int((folder / EXIT_CODE).read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None
