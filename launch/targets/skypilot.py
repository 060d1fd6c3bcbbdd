"""`--to skypilot`: a task for SkyPilot, which finds machines in clouds or in Kubernetes and starts it there.

Every node runs the same `run`: the first is Ray's head and executes the run, the others join it. Results are on a
volume or a file system that all nodes have. Only `submit` goes through here; SkyPilot's own commands do the rest, and
the other verbs name them. Not tried against a cloud; tests validate the YAML against a schema.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.refusal import refusal
from launch.targets import JobRecord, JobStatus, Shipment, common, options_of
from launch.targets.common import COMMAND, Line, Python, Variable, WithEnvironment
from trainer.errors import ConfigError, InfrastructureError, Preempted

if TYPE_CHECKING:
    from cluster.placement.memory.verdict import Offer
    from launch.bundle import Bundle

TASK = "task.yaml"
TOKEN = "STILLHOUSE_RAY_TOKEN"
LAUNCH_TIMEOUT_S = 3600


class Options(WithEnvironment):
    """What `--with` takes; `shared` is needed where there are several nodes."""

    INSTEAD_OF_A_SECRET = "export it here and write secrets=[{name}]"

    nodes: PositiveInt = 1
    infra: str | None = Field(None, min_length=1, description="Cloud, region, zone: k8s, aws/us-east-1; None: any.")
    accelerators: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+(:\d+)?$")] | None = Field(
        None, description="Of each node: H100:8."
    )
    cpus: Annotated[str, Field(pattern=r"^\d+\+?$")] | PositiveInt | None = None
    memory: Annotated[str, Field(pattern=r"^\d+\+?$")] | PositiveInt | None = Field(
        None, description="GB of each node."
    )
    disk_gb: PositiveInt | None = None
    image: str | None = Field(None, min_length=1, description="docker:NAME, or an image of the cloud.")
    use_spot: bool = Field(False, description="All nodes: for roles apart, see --to kuberay.")
    managed: bool = Field(True, description="A managed job (sky jobs), started again when its machines are taken.")
    max_restarts: NonNegativeInt = Field(1, description="Managed: more starts after a failure, whatever its exit code.")
    shared: dict[Annotated[str, Field(pattern=r"^/[A-Za-z0-9_./-]+$")], str] = Field(
        {}, description="Path on the nodes: name of a SkyPilot volume; one, for run folder and models."
    )
    python: Python = "python"
    setup: tuple[Line, ...] = Field((), description="Shell lines for every new machine, such as an installation.")
    secrets: tuple[Variable, ...] = Field((), description="Variables whose values SkyPilot takes from here, hidden.")
    start_timeout_s: PositiveInt = 600

    @model_validator(mode="after")
    def _nodes_share_a_folder(self) -> Options:
        if len(self.shared) > 1:
            raise refusal(("shared",), sorted(self.shared), "name one volume: run folder and models lie in it")
        return self


class Target:
    """See `launch.targets.Target`."""

    Options = Options

    def prepare(self, bundle: Bundle, options: Options, job: str) -> Shipment:
        run = bundle.run
        common.refuse_in_process(run, "skypilot")
        note = "Not tried against a cloud by the tests of this project."
        if not options.shared:
            note += f" No volume is named: {run.folder} is on the machine and goes with it"
            if options.nodes > 1:
                raise ConfigError(
                    f"--to skypilot: {options.nodes} nodes need a volume for the run folder and the models: make one "
                    "with sky volumes apply, and write --with shared='{/shared: NAME}'"
                )
        note += "".join(common.note_of_paths_outside(run, mount) for mount in options.shared)
        parts = common.parts_of(bundle, ["code", "prompts", "run.yaml"])
        task = common.render(
            "skypilot.yaml.jinja",
            run=run.name,
            job=job,
            preempted=Preempted.exit_code,
            variables={**common.ray_environment(), **options.environment},
            parts=list(parts),
            token=TOKEN,
            train=shlex.join([options.python, *COMMAND]),
            **options.model_dump(),
        )
        return Shipment({TASK: task, **parts}, _command(options, job), note)

    def offer(self, options: Options) -> Offer:
        kind, _, count = (options.accelerators or ":0").partition(":")
        memory = None if options.memory is None else options.nodes * common.bytes_of(str(options.memory), plain="G")
        gpus = [kind] * (int(count or 1) * options.nodes)
        return common.offer_of("the task", gpus, host_bytes=memory)

    def submit(self, bundle: Bundle, shipment: Shipment, options: Options, job: str) -> JobRecord:
        if shutil.which("sky") is None:
            raise common.missing_command("skypilot", "sky")
        missing = [name for name in options.secrets if name not in os.environ]
        if missing:
            raise ConfigError(f"--with secrets: {', '.join(missing)} is not set in this shell, whose values are sent")
        (bundle.folder / TASK).write_text(str(shipment.files[TASK]), encoding="utf-8")
        environment = {**os.environ, TOKEN: secrets.token_hex(32)}  # by name on the command line, and hidden by sky
        try:
            done = subprocess.run(
                shipment.command,
                cwd=bundle.folder,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
                timeout=LAUNCH_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InfrastructureError(f"sky did not launch {job} within {LAUNCH_TIMEOUT_S} s: see sky status") from None
        if done.returncode:
            raise InfrastructureError(f"{shlex.join(shipment.command)}: {done.stderr.strip() or done.returncode}")
        return JobRecord.of(job, "skypilot", bundle, options, handle=job)

    def status(self, record: JobRecord) -> JobStatus:
        _instead("status", "sky jobs queue", "sky queue", record)

    def logs(self, record: JobRecord, *, follow: bool) -> Iterator[str]:
        _instead("logs", f"sky jobs logs --name {record.handle}", f"sky logs {record.handle}", record)

    def stop(self, record: JobRecord) -> None:
        _instead("stop", f"sky jobs cancel --name {record.handle}", f"sky down {record.handle}", record)

    def list(self, options: Options) -> list[JobStatus]:
        raise ConfigError("stillhouse list does not ask SkyPilot. Type: sky jobs queue, or sky status")

    def fetch(self, record: JobRecord, destination: Path) -> None:
        copy = f"scp -r {record.handle}:{record.folder} {shlex.quote(str(destination))}"
        _instead("fetch", copy, copy, record)


def _instead(verb: str, managed: str, unmanaged: str, record: JobRecord) -> NoReturn:
    command = managed if options_of(Target, record).managed else unmanaged
    raise ConfigError(f"stillhouse {verb} does not ask SkyPilot. Type: {command}")


def _command(options: Options, job: str) -> tuple[str, ...]:
    hidden = [f"--secret={name}" for name in (TOKEN, *options.secrets)]
    if options.managed:
        return ("sky", "jobs", "launch", "--yes", "--detach-run", f"--name={job}", *hidden, TASK)
    return ("sky", "launch", "--yes", "--detach-run", "--down", f"--cluster={job}", *hidden, TASK)
