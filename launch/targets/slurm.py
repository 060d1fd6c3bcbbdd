"""`--to slurm`: a batch script that a person can read, in a folder that every node sees.

    <run folder>/submissions/<job>/  job.sbatch   the script; its options are its #SBATCH lines
                                     run.yaml, code/, prompts/             the bundle
                                     job.log, ray-<node>.log, failures     written by the job
                                     ray_token.<id>.<start>                while it runs, mode 0600

Submit where sbatch works and where the run folder is the one the nodes see. Slurm is asked through its commands alone.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launch.jobs import copy_results, run_status, waited_too_long
from launch.targets import OVER, JobRecord, JobStatus, Shipment, State, state_of
from launch.targets.common import (
    bytes_of,
    follow_file,
    missing_command,
    offer_of,
    refuse_in_process,
    run_command,
    wait_until,
    write_files,
)
from launch.targets.slurm_script import MARK, Options, render, submission_folder
from trainer.errors import ConfigError, InfrastructureError

if TYPE_CHECKING:
    from cluster.placement.memory.verdict import Offer
    from launch.bundle import Bundle

SCRIPT, LOG, STOP_ASKED = "job.sbatch", "job.log", "stop_asked"

_WORDS: dict[State, str] = {
    "pending": "PENDING CONFIGURING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT SUSPENDED",
    "running": "RUNNING COMPLETING RESIZING SIGNALING STAGE_OUT STOPPED",
    "succeeded": "COMPLETED",
    "stopped": "CANCELLED",
    "preempted": "PREEMPTED",
}
STATES: dict[str, State] = {word: state for state, words in _WORDS.items() for word in words.split()}
"""By Slurm's name for the state of a job; any other state is a failure."""

POLL_S = 2.0
LOST = r"contact slurm controller|Connection (refused|timed out)|Socket timed out"
STOP_MARGIN_S = 120
"""For the end of Ray on all nodes and Slurm's own pace, beside what a checkpoint may take."""


class Target:
    """See `launch.targets.Target`."""

    Options = Options

    def prepare(self, bundle: Bundle, options: Options, job: str) -> Shipment:
        if options.nodes is None:
            raise ConfigError("--to slurm needs the number of nodes, for example --with nodes=2")
        refuse_in_process(bundle.run, "slurm")
        folder = submission_folder(bundle, job)
        script = render(bundle, options, job)
        sent = {file.name: file for file in sorted(bundle.folder.iterdir())}
        note = f"copied to {folder}, which every node must see under this path; output in {folder / LOG}"
        return Shipment({SCRIPT: script, **sent}, ("sbatch", "--parsable", str(folder / SCRIPT)), note)

    def offer(self, options: Options) -> Offer | None:
        if options.nodes is None:
            return None
        kind, _, count = str(options.gpus_per_node or 0).rpartition(":")
        memory = None if options.memory is None else options.nodes * bytes_of(str(options.memory), plain="M")
        where = f"the job's {options.nodes} node{'s' if options.nodes > 1 else ''}"
        return offer_of(where, [kind] * (int(count) * options.nodes), host_bytes=memory)

    def submit(self, bundle: Bundle, shipment: Shipment, options: Options, job: str) -> JobRecord:
        if shutil.which("sbatch") is None:
            raise missing_command("slurm", "sbatch")
        folder = submission_folder(bundle, job)
        try:
            write_files(folder, shipment.files)
        except OSError as error:
            raise ConfigError(
                f"folder: cannot write {folder}: {error.strerror or error}. The run folder must be on a file system "
                "that this machine and the nodes share: --set folder=/shared/runs/NAME"
            ) from None
        try:
            answer = _slurm(*shipment.command).strip()
        except (ConfigError, InfrastructureError):
            shutil.rmtree(folder)
            raise
        handle = answer.partition(";")[0]  # on clusters of clusters the name follows
        if not handle.isdecimal():
            raise InfrastructureError(f"sbatch answered {answer!r} in place of a job id; see squeue --me")
        return JobRecord.of(job, "slurm", bundle, options, handle=handle)

    def status(self, record: JobRecord) -> JobStatus:
        folder = _folder_of(record)
        written = run_status(Path(record.folder), record.job)
        facts = _job_facts(record.handle)
        word = facts.get("JobState", "").split(",")[0]
        state, code = STATES.get(word, "failed"), None
        if word in ("COMPLETED", "FAILED"):
            code = int(facts["ExitCode"].split(":")[0])
        elif not facts:  # Slurm forgets a job some minutes after its end
            code = written.exit_code
        if code is not None:
            state = state_of(code)
        if state in ("preempted", "failed") and (folder / STOP_ASKED).exists():
            state = "stopped"
        message = _message(facts, word, written.reason if state == "failed" else "")
        return record.status(state, code, message=message, written=written)

    def logs(self, record: JobRecord, *, follow: bool) -> Iterator[str]:
        over = lambda: not follow or self.status(record).over  # noqa: E731
        return follow_file(_folder_of(record) / LOG, over=over, poll_s=POLL_S)

    def stop(self, record: JobRecord) -> None:
        """TERM to the batch script, which has the run save and end; after `grace_s` and two minutes, scancel."""
        state = self.status(record).state
        if state in OVER:
            return
        (_folder_of(record) / STOP_ASKED).touch()
        if state == "running":
            _slurm("scancel", "--batch", "--signal=TERM", record.handle)
            if self._ended(record, int(record.options["grace_s"]) + STOP_MARGIN_S):
                return
        _slurm("scancel", record.handle)
        if not self._ended(record, STOP_MARGIN_S):
            instead = f"A node that does not answer keeps it: see scontrol show job {record.handle}"
            raise waited_too_long(f"Slurm job {record.handle}, cancelled,", STOP_MARGIN_S, instead=instead)

    def list(self, options: Options) -> list[JobStatus]:
        answer = _slurm("squeue", f"--user={os.getuid()}", "--states=all", "--noheader", "--format=%i|%T|%j|%V|%k")
        found = []
        for line in answer.splitlines():
            handle, word, name, submitted, comment = line.strip().split("|", 4)
            if comment.startswith(MARK):
                when = time.mktime(time.strptime(submitted, "%Y-%m-%dT%H:%M:%S"))
                state, message = STATES.get(word, "failed"), f"Slurm job {handle}: {word}"
                job = comment.removeprefix(MARK)
                found.append(JobStatus(job, state, message=message, name=name, submitted=when))
        return found

    def fetch(self, record: JobRecord, destination: Path) -> None:
        copy_results(Path(record.folder), destination)

    def _ended(self, record: JobRecord, seconds: float) -> bool:
        return wait_until(lambda: self.status(record).over, seconds=seconds, poll_s=POLL_S)


# --- Slurm's commands -------------------------------------------------------------------------------------------------


def _slurm(*command: str) -> str:
    """What a command of Slurm prints. Raises as `run_command` does."""
    return run_command(*command, kind="slurm", lost=LOST)


def _job_facts(handle: str) -> dict[str, str]:
    """`scontrol show job` as a mapping; empty for a job that Slurm has forgotten."""
    try:
        answer = _slurm("scontrol", "show", "job", handle)
    except ConfigError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return dict(re.findall(r"(\w+)=(\S*)", answer))


def _folder_of(record: JobRecord) -> Path:
    return Path(record.folder) / "submissions" / record.job


def _message(facts: Mapping[str, str], word: str, error: str) -> str:
    if not facts:
        return error or "Slurm has forgotten the job"
    reason = facts.get("Reason", "None")
    parts = [f"Slurm job {facts['JobId']}: {word}" + ("" if reason == "None" else f" ({reason})")]
    if facts.get("Restarts", "0") != "0":
        parts.append(f"queued again {facts['Restarts']} times")
    return "; ".join([*parts, *filter(None, [error])])
