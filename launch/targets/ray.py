"""`--to ray`: a job on a Ray cluster that is already there, from a machine that need not be a member of it.

    check address, token, versions  ->  upload the bundle  ->  job: `python -m launch train run.yaml` in its folder

Ray unpacks the upload on every node that works for the job and starts every process of it there, with PYTHONPATH at
the bundle's code; RAY_ADDRESS, which Ray sets for the driver, makes `train` join the cluster. No variable of this
machine travels: tokens for hubs belong into the environment of the nodes.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import shlex
import tempfile
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from launch.jobs import (
    METRICS_LINES,
    copy_results,
    ending_file,
    refuse_run_folder,
    run_status,
    visible_folder,
    waited_too_long,
)
from launch.targets import OVER, JobRecord, JobStatus, RunStatus, Shipment, State, options_of, state_of
from launch.targets.common import NotFound, Unreachable, WithEnvironment, is_loopback, train_command, wait_until
from trainer.errors import ConfigError, InfrastructureError, Preempted, foreign_errors

if TYPE_CHECKING:
    from launch.bundle import Bundle
    from launch.targets.ray_client import Client, JobDetails

STATES: dict[str, State] = {state.upper(): state for state in ("pending", "running", "succeeded", "failed", "stopped")}
"""By Ray's name."""
PACKAGE_LIMIT = 500 * 2**20
"""Ray refuses uploads from 512 MiB on, after they have been sent."""

POLL_S = 1.0
MAX_EMPTY_FOLLOWS = 20


class Options(WithEnvironment):
    """What `--with` takes."""

    INSTEAD_OF_A_SECRET = (
        "whoever sees the cluster's jobs can read it; set {name} in the environment of the nodes, before ray start"
    )
    RESERVED = r"PYTHONPATH|RAY_JOB_.*"

    address: str = Field("http://127.0.0.1:8265", description="Of the cluster's dashboard.")
    token_path: str | None = Field(None, description="File with its token; None: RAY_AUTH_TOKEN_PATH, as Ray reads it.")
    insecure: bool = Field(False, description="Submit over a network to a cluster that asks for no token.")
    python: str = Field("python", min_length=1, description="Python of the nodes.")
    driver_cpus: NonNegativeFloat = Field(0, description="With these or driver_resources it runs where they are free.")
    driver_resources: dict[str, PositiveFloat] = Field({}, description="Ray resources the driver holds; none: head.")
    stop_wait_s: PositiveInt = Field(1800, description="From `stop` until Ray kills a driver that still saves.")


class Target:
    """See `launch.targets.Target`."""

    Options = Options

    def prepare(self, bundle: Bundle, options: Options, job: str) -> Shipment:
        folder = str(bundle.run.folder)
        command = (options.python, *train_command(bundle.run, job))
        request = {
            "entrypoint": f"{linking_command(folder, job)}; exec {shlex.join(command)}",
            "submission_id": job,
            "metadata": {"stillhouse": "train", "name": bundle.run.name, "folder": folder, "build": bundle.build},
            "runtime_env": {
                "env_vars": {
                    **options.environment,
                    "PYTHONPATH": "code",  # below the working directory, where Ray starts every process of the job
                    "RAY_JOB_STOP_WAIT_TIME_S": str(options.stop_wait_s),
                }
            },
        }
        if options.driver_cpus:
            request["entrypoint_num_cpus"] = options.driver_cpus
        if options.driver_resources:
            request["entrypoint_resources"] = options.driver_resources
        where = "where its resources are free" if options.driver_cpus or options.driver_resources else "on the head"
        return Shipment(
            files={"job.json": json.dumps(request, indent=1), "working_dir": bundle.folder},
            command=command,
            note=f"A job for the Ray cluster at {options.address}; working_dir is uploaded, the rest of the request is "
            f"job.json. The driver runs {where}; models and the run folder {folder} must be visible under these paths "
            "on the nodes.",
            warnings=_warnings(options),
        )

    def submit(self, bundle: Bundle, shipment: Shipment, options: Options, job: str) -> JobRecord:
        if bundle.num_bytes > PACKAGE_LIMIT:
            raise ConfigError(
                f"the upload has {bundle.num_bytes / 2**20:.0f} MiB, and Ray takes at most "
                f"{PACKAGE_LIMIT / 2**20:.0f}: put rows where every node sees them, and name that place with --shared"
            )
        client = _client(options)
        client.check_versions()
        if client.is_open and not options.insecure:
            raise ConfigError(
                f"the cluster at {options.address} asks for no token: whoever reaches it runs code on it. Start "
                "it with RAY_AUTH_MODE=token, or keep its dashboard on 127.0.0.1 and reach it through ssh -L; where "
                "something else protects it, write --with insecure=true"
            )
        _refuse_second(client, str(bundle.run.folder))
        request = json.loads(str(shipment.files["job.json"]))
        request["runtime_env"]["working_dir"] = str(shipment.files["working_dir"])
        with foreign_errors(f"the cluster at {options.address} did not take the job", error=InfrastructureError):
            client.submit_job(**request)
        return JobRecord.of(job, "ray", bundle, options, handle=job)

    def status(self, record: JobRecord) -> JobStatus:
        client = _client(options_of(Target, record))
        try:
            known = client.get_job_info(record.handle)
        except NotFound as error:
            return _forgotten(record, str(error))
        return _status(record, known, _fetch_run_status(client, record, known))

    def logs(self, record: JobRecord, *, follow: bool) -> Iterator[str]:
        client = _client(options_of(Target, record))
        known = client.get_job_info(record.handle)
        if not follow:
            if known.driver_node_id:
                log = client.log_file(known.driver_node_id, f"job-driver-{record.handle}.log")
                yield from codecs.iterdecode(log, "utf-8", "replace")
            return
        seen, empty = 0, 0
        while empty < MAX_EMPTY_FOLLOWS:
            position, before = 0, seen
            for piece in _followed(client, record.handle):
                position += len(piece)
                if position > seen:
                    yield piece[-(position - seen) :]
                    seen = position
            if _is_over(client, record):
                return
            empty = empty + 1 if seen == before else 0
            time.sleep(POLL_S)  # the connection broke, the job did not
        raise InfrastructureError(
            f"the output of {record.job} cannot be followed at {client.address} (does a proxy refuse web sockets?); "
            f"stillhouse logs {record.name} prints what there is"
        )

    def stop(self, record: JobRecord) -> None:
        options = options_of(Target, record)
        client = _client(options)
        if STATES[client.get_job_info(record.handle).status] in OVER:
            return
        client.stop_job(record.handle)
        seconds = options.stop_wait_s + 60
        if not wait_until(lambda: _is_over(client, record), seconds=seconds, poll_s=POLL_S):
            raise waited_too_long(record.job, seconds, instead="Is the cluster's head alive?")

    def list(self, options: Options) -> list[JobStatus]:
        found = []
        for known in _jobs(_client(options)):
            name, folder = known.metadata["name"], known.metadata["folder"]
            began = (known.start_time or 0) / 1000
            record = JobRecord(known.submission_id, "ray", name, folder, submitted=began)
            found.append(_status(record, known, RunStatus()))
        return found

    def fetch(self, record: JobRecord, destination: Path) -> None:
        folder = visible_folder(record)
        if folder is not None:
            copy_results(folder, destination)
            return
        from launch.targets.ray_fetch import fetch_results

        refuse_run_folder(destination)
        options = options_of(Target, record)
        client = _client(options)
        try:
            node_id = client.get_job_info(record.handle).driver_node_id
        except NotFound:
            node_id = None
        if node_id is not None and node_id not in client.living_nodes():
            node_id = None  # the folder may be shared with the head
        fetch_results(client, record, destination, python=options.python, node_id=node_id)


def _warnings(options: Options) -> tuple[str, ...]:
    parts = urllib.parse.urlsplit(options.address)
    if parts.scheme != "http" or not parts.hostname or is_loopback(parts.hostname):
        return ()
    return (
        f"token and code go to {parts.hostname} unencrypted: use a private network, or "
        f"ssh -L 8265:127.0.0.1:{parts.port or 80} {parts.hostname} and --with address=http://127.0.0.1:8265",
    )


def _client(options: Options) -> Client:
    from launch.targets.ray_client import Client

    return Client(options.address, token_path=options.token_path)


def run_folder_link(job: str) -> str:
    """What the job's run folder is called in the log folder of the driver's node, whose files Ray serves."""
    return f"stillhouse-{job}"


def linking_command(folder: str, job: str) -> str:
    """For the shell of an entrypoint: make that link. Its own output lies in the log folder."""
    return f'ln -sfn {shlex.quote(folder)} "$(dirname "$(readlink /proc/$$/fd/1)")"/{run_folder_link(job)}'


def _jobs(client: Client) -> list[JobDetails]:
    """Runs, and neither jobs of others nor those of `fetch`."""
    return [job for job in client.list_jobs() if (job.metadata or {}).get("stillhouse") == "train"]


def _refuse_second(client: Client, folder: str) -> None:
    """Raises `ConfigError` where a job of the same run folder is not over."""
    for job in _jobs(client):
        if job.metadata["folder"] == folder and STATES[job.status] not in OVER:
            raise ConfigError(
                f"folder: the job {job.submission_id} of the same run folder {folder} is {STATES[job.status]} on "
                f"{client.address}. Watch it with stillhouse logs -f {job.metadata['name']}, stop it with stillhouse "
                "stop, or give this run another name"
            )


def _is_over(client: Client, record: JobRecord) -> bool:
    """For callers that ask again: a head that does not answer just now is busy, and says nothing of the job."""
    try:
        return STATES[client.get_job_info(record.handle).status] in OVER
    except NotFound:  # the cluster was started anew
        return True
    except (Unreachable, InfrastructureError):
        return False


def _forgotten(record: JobRecord, reason: str) -> JobStatus:
    """Of a job whose cluster was started anew: what its run folder says, where that is visible here."""
    folder = visible_folder(record)
    written = RunStatus() if folder is None else run_status(folder, record.job)
    return record.status(state_of(written.exit_code), written.exit_code, message=reason, written=written)


def _fetch_run_status(client: Client, record: JobRecord, known: JobDetails) -> RunStatus:
    """What the run wrote, brought here through the link that the job made."""
    if not known.driver_node_id:
        return RunStatus()
    ending = ending_file(Path(), record.job)
    wanted = {"manifest.json": -1, "metrics.jsonl": METRICS_LINES}
    if STATES[known.status] in OVER:
        wanted[str(ending)] = -1
    with tempfile.TemporaryDirectory(prefix="stillhouse-status-") as place:
        Path(place, ending).parent.mkdir(parents=True)
        with contextlib.suppress(Unreachable):  # busy: what the cluster says of the job is known
            for name, lines in wanted.items():
                with contextlib.suppress(InfrastructureError):  # not written yet, or the node is gone
                    content = client.log_text(
                        known.driver_node_id, f"{run_folder_link(record.job)}/{name}", lines=lines
                    )
                    Path(place, name).write_bytes(content)
        return run_status(Path(place), record.job)


def _status(record: JobRecord, known: JobDetails, written: RunStatus) -> JobStatus:
    state, code = STATES[known.status], known.driver_exit_code
    if state == "stopped" and code is None:
        code = written.exit_code  # Ray keeps none of a job it stopped
        state = "succeeded" if code == 0 else state  # it was at its end
    if state == "failed" and code == Preempted.exit_code:
        state = "preempted"
    from_ray = (known.message or "").split("last available logs")[0].strip().rstrip(",")[:500]
    message = {"pending": from_ray, "running": "", "succeeded": ""}.get(state, written.reason or from_ray)
    return record.status(state, code if state in OVER else None, message=message, written=written)


def _followed(client: Client, job: str) -> Iterator[str]:
    """Ray's asynchronous log stream from its beginning, as a plain iterator; ends with the job, or earlier."""
    import aiohttp

    async def next_of(stream: AsyncIterator[str]) -> str | None:
        return await anext(stream, None)

    with asyncio.Runner() as runner:  # it ends the connection on Ctrl-C, too
        try:
            stream = client.tail_job_logs(job)
            while (piece := runner.run(next_of(stream))) is not None:
                yield piece
        except (RuntimeError, OSError, aiohttp.ClientError):
            return  # the caller asks how the job is, and comes again
