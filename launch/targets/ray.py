"""`--to ray`: a job on a Ray cluster that is already there, from a machine that need not be a member of it.

    check address, token, versions  ->  upload the bundle  ->  job: `python -m launch train run.yaml` in its folder

Ray unpacks the upload on every node that works for the job and starts every process of it there, with PYTHONPATH at
the bundle's code; RAY_ADDRESS, which Ray sets for the driver, makes `train` join the cluster. No variable of this
machine travels: tokens for hubs belong into the environment of the nodes.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import shlex
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from launch.bundle import COMMAND, Bundle
from launch.jobs import TAIL_LINES, Tail, copy_results, exit_code_in, refuse_run_folder, visible_folder, waited_too_long
from launch.targets import JobRecord, JobStatus, Shipment, State, options_of
from launch.targets.common import WithEnvironment
from launch.targets.ray_api import NotFound, RayApi, Unreachable, is_loopback
from launch.targets.ray_fetch import fetch_results
from trainer.errors import ConfigError, InfrastructureError, Preempted

STATES: dict[str, State] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}
PACKAGE_LIMIT = 500 * 2**20
"""Ray refuses uploads from 512 MiB on, after they have been sent."""

POLL_S = 1.0
MAX_VAIN_FOLLOWS = 20


class Options(WithEnvironment):
    """What `--with` takes."""

    INSTEAD_OF_A_SECRET = (
        "everybody who can see the cluster's jobs can read it; set {name} in the environment of the nodes, before ray "
        "start"
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
        request = {
            "entrypoint": f"exec {shlex.join((options.python, *COMMAND))}",
            "submission_id": job,
            "metadata": {
                "stillhouse": "train",
                "name": bundle.run.name,
                "folder": str(bundle.run.folder),
                "build": bundle.build,
            },
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
        return Shipment(
            files={"job.json": json.dumps(request, indent=1), "working_dir": bundle.folder},
            command=(options.python, *COMMAND),
            note=f"A job for the Ray cluster at {options.address}; working_dir is uploaded, the rest of the request is "
            f"job.json. The driver runs {_where(options)}; models and the run folder {bundle.run.folder} must be "
            "visible under these paths on the nodes.",
            warnings=_warnings(options),
        )

    def submit(self, bundle: Bundle, shipment: Shipment, options: Options, job: str) -> JobRecord:
        if bundle.num_bytes > PACKAGE_LIMIT:
            raise ConfigError(
                f"the upload has {bundle.num_bytes / 2**20:.0f} MiB, and Ray takes at most "
                f"{PACKAGE_LIMIT / 2**20:.0f}: put rows where every node sees them, and name that place with --shared"
            )
        api = _api(options)
        api.check()
        if api.is_open and not options.insecure:
            raise ConfigError(
                f"the cluster at {options.address} asks for no token: whoever reaches it runs code on it. Start "
                "it with RAY_AUTH_MODE=token, or keep its dashboard on 127.0.0.1 and reach it through ssh -L; where "
                "something else protects it, write --with insecure=true"
            )
        _refuse_second(api, str(bundle.run.folder))
        request = json.loads(str(shipment.files["job.json"]))
        request["runtime_env"]["working_dir"] = str(shipment.files["working_dir"])
        api.submit(**request)
        return JobRecord.of(job, "ray", bundle, options, handle=job)

    def status(self, record: JobRecord) -> JobStatus:
        api = _api(_options(record))
        try:
            known = api.job(record.handle)
        except NotFound:
            return _forgotten(record, api)
        return _status(record, known, Tail.of(api.output_tail(known, lines=TAIL_LINES)))

    def logs(self, record: JobRecord, *, follow: bool) -> Iterator[str]:
        api = _api(_options(record))
        known = _known(api, record)
        if not follow:
            yield from codecs.iterdecode(api.output(known), "utf-8", "replace")
            return
        seen, in_vain = 0, 0
        while in_vain < MAX_VAIN_FOLLOWS:
            position, before = 0, seen
            for piece in _followed(api, record.handle):
                position += len(piece)
                if position > seen:
                    yield piece[-(position - seen) :]
                    seen = position
            if self._is_over(record):
                return
            in_vain = in_vain + 1 if seen == before else 0
            time.sleep(POLL_S)  # the connection broke, the job did not
        raise InfrastructureError(
            f"the output of {record.job} cannot be followed at {api.address} (does a proxy refuse web sockets?); "
            f"stillhouse logs {record.name} prints what there is"
        )

    def _is_over(self, record: JobRecord) -> bool:
        """For callers that ask again: a head that does not answer just now is busy, and says nothing of the job."""
        try:
            return self.status(record).over
        except (Unreachable, InfrastructureError):
            return False

    def stop(self, record: JobRecord) -> None:
        options = _options(record)
        api = _api(options)
        if self.status(record).over:
            return
        api.stop(record.handle)
        deadline = time.monotonic() + options.stop_wait_s + 60
        while not self._is_over(record):
            if time.monotonic() > deadline:
                raise waited_too_long(record.job, options.stop_wait_s + 60, instead="Is the cluster's head alive?")
            time.sleep(POLL_S)

    def list(self, options: Options) -> list[JobStatus]:
        jobs = [job for job in _api(options).jobs() if (job.get("metadata") or {}).get("stillhouse") == "train"]
        records = [
            JobRecord(
                job=job["submission_id"],
                kind="ray",
                name=job["metadata"]["name"],
                folder=job["metadata"]["folder"],
                submitted=job["start_time"] / 1000,
            )
            for job in jobs
        ]
        found = [_status(record, job, Tail()) for record, job in zip(records, jobs, strict=True)]
        return sorted(found, key=lambda status: status.submitted or 0, reverse=True)

    def fetch(self, record: JobRecord, destination: Path) -> None:
        folder = visible_folder(record)
        if folder is not None:
            copy_results(folder, destination)
            return
        refuse_run_folder(destination)
        options = _options(record)
        api = _api(options)
        try:
            node_id = api.job(record.handle).get("driver_node_id")
        except NotFound:
            node_id = None
        if node_id is not None and node_id not in api.living_nodes():
            node_id = None  # the folder may be shared with the head
        fetch_results(api, record.folder, destination, python=options.python, node_id=node_id)


def _warnings(options: Options) -> tuple[str, ...]:
    parts = urllib.parse.urlsplit(options.address)
    if parts.scheme != "http" or not parts.hostname or is_loopback(parts.hostname):
        return ()
    return (
        f"token and code go to {parts.hostname} unencrypted: use a private network, or "
        f"ssh -L 8265:127.0.0.1:{parts.port or 80} {parts.hostname} and --with address=http://127.0.0.1:8265",
    )


def _where(options: Options) -> str:
    held = {**({"CPU": options.driver_cpus} if options.driver_cpus else {}), **options.driver_resources}
    if not held:
        return "on the head"
    return "on a node with " + ", ".join(f"{name}: {amount:g}" for name, amount in held.items())


def _options(record: JobRecord) -> Options:
    return options_of(Target, record)


def _api(options: Options) -> RayApi:
    return RayApi(options.address, token_path=options.token_path)


def _refuse_second(api: RayApi, folder: str) -> None:
    """Raises `ConfigError` where a job of the same run folder is not over."""
    for job in api.jobs():
        same = (job.get("metadata") or {}).get("folder") == folder
        if same and job["status"] in ("PENDING", "RUNNING"):
            name, state = job["submission_id"], job["status"].lower()
            raise ConfigError(
                f"folder: the job {name} of the same run folder {folder} is {state} on {api.address}. Watch it with "
                f"stillhouse logs -f {job['metadata']['name']}, stop it with stillhouse stop, or give this run "
                "another name"
            )


def _known(api: RayApi, record: JobRecord) -> dict[str, Any]:
    try:
        return api.job(record.handle)
    except NotFound:
        raise InfrastructureError(_unknown(record, api)) from None


def _unknown(record: JobRecord, api: RayApi) -> str:
    return f"the cluster at {api.address} does not know the job {record.handle}: was it started anew since?"


def _forgotten(record: JobRecord, api: RayApi) -> JobStatus:
    """Of a job whose cluster was started anew: what its run folder says, where that is visible here."""
    folder = visible_folder(record)
    code = None if folder is None else exit_code_in(folder, since=record.submitted)
    state: State = "succeeded" if code == 0 else "preempted" if code == Preempted.exit_code else "failed"
    return JobStatus(
        record.job, state, code, message=_unknown(record, api), name=record.name, submitted=record.submitted
    )


def _status(record: JobRecord, known: dict[str, Any], tail: Tail) -> JobStatus:
    state = STATES[known["status"]]
    code = known.get("driver_exit_code")
    if state == "stopped" and code is None:
        code = tail.exit_code  # Ray keeps none of a job it stopped
        state = "succeeded" if code == 0 else state  # it was at its end
    if state == "failed" and code == Preempted.exit_code:
        state = "preempted"
    running = state in ("pending", "running")
    message = "" if running or state == "succeeded" else tail.error or _first_lines(known.get("message") or "")
    if state == "pending":
        message = _first_lines(known.get("message") or "")
    return JobStatus(
        job=record.job,
        state=state,
        exit_code=None if running else code,
        step=tail.step,
        steps=tail.steps,
        message=message,
        name=record.name,
        submitted=record.submitted,
    )


def _first_lines(text: str, limit: int = 500) -> str:
    return text.split("last available logs")[0].strip().rstrip(",")[:limit]


def _followed(api: RayApi, job: str) -> Iterator[str]:
    """Ray's asynchronous log stream from its beginning, as a plain iterator; ends with the job, or earlier."""
    import aiohttp

    async def next_of(stream: AsyncIterator[str]) -> str | None:
        return await anext(stream, None)

    with asyncio.Runner() as runner:  # it ends the connection on Ctrl-C, too
        try:
            stream = api.client().tail_job_logs(job)
            while (piece := runner.run(next_of(stream))) is not None:
                yield piece
        except (RuntimeError, OSError, aiohttp.ClientError):
            return  # the caller asks how the job is, and comes again
