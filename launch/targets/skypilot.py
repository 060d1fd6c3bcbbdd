"""`--to skypilot`: a task for SkyPilot, which finds machines in clouds or in Kubernetes and starts it there.

Every node runs the same `run`: the first is Ray's head and executes the run, the others join it. Results are on a
volume or a file system that all nodes have. Only `submit` goes through here; SkyPilot's own commands do the rest, and
the other verbs name them. Against a cloud nothing of this was tried; the YAML is held against a schema.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from cluster.ray_session import RAY_SETTINGS
from configs.refusal import refusal
from configs.schema import Run, Section
from launch.bundle import COMMAND, Bundle
from launch.commented_yaml import Note, dump
from launch.targets import JobRecord, JobStatus, Shipment, options_of
from launch.targets.ray import SECRET_NAME
from launch.targets.run_checks import paths_outside, refuse_in_process
from trainer.errors import ConfigError, InfrastructureError, Preempted

TASK = "task.yaml"
HOME = "~/stillhouse"
TOKEN = "STILLHOUSE_RAY_TOKEN"
RAY_PORT, CLIENT_PORT = 6390, 10101  # SkyPilot's own Ray has 6380, and every machine is the task's alone
LAUNCH_TIMEOUT_S = 3600

Line = Annotated[str, Field(pattern=r"^[^\r\n]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Options(Section):
    """What `--with` takes; `shared` is needed where there are several nodes."""

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
    python: Annotated[str, Field(pattern=r"^[^\s'\"]+$")] = "python"
    setup: tuple[Line, ...] = Field((), description="Shell lines for every new machine, such as an installation.")
    environment: dict[Variable, str] = Field({}, description="Variables of every process; no secrets.")
    secrets: tuple[Variable, ...] = Field((), description="Variables whose values SkyPilot takes from here, hidden.")
    start_timeout_s: PositiveInt = 600

    @model_validator(mode="after")
    def _no_secret_in_the_yaml(self) -> Options:
        for name in self.environment:
            if SECRET_NAME.search(name):
                text = f"looks like a secret: export it here and write secrets=[{name}]"
                raise refusal(("environment", name), "...", text)
        return self

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
        refuse_in_process(run, "skypilot")
        note = "Not tried against a cloud by the tests of this project."
        if not options.shared:
            note += f" No volume is named: {run.folder} is on the machine and goes with it"
            if options.nodes > 1:
                raise ConfigError(
                    f"--to skypilot: {options.nodes} nodes need a volume for the run folder and the models: make one "
                    "with sky volumes apply, and write --with shared='{/shared: NAME}'"
                )
        for mount in options.shared:
            outside = paths_outside(run, mount)
            if outside:
                note += f" Not on the volume, so the image must hold it: {', '.join(outside)}."
        parts = [part for part in ("code", "prompts", "run.yaml") if (bundle.folder / part).exists()]
        files: dict[str, str | Path] = {TASK: task(run, options, job, parts)}
        return Shipment(files | {part: bundle.folder / part for part in parts}, _command(options, job), note)

    def submit(self, bundle: Bundle, shipment: Shipment, options: Options, job: str) -> JobRecord:
        if shutil.which("sky") is None:
            raise ConfigError("--to skypilot: there is no sky on this machine. --dry-run prints the YAML without it")
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
        return JobRecord(
            job=job,
            kind="skypilot",
            name=bundle.run.name,
            folder=str(bundle.run.folder),
            handle=job,
            options=options.model_dump(mode="json"),
        )

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


# --- the task ---------------------------------------------------------------------------------------------------------


def task(run: Run, options: Options, job: str, parts: list[str]) -> str:
    """The task as YAML with comments; `parts` of the bundle lie beside it."""
    content: dict[str, Any] = {"name": job, "num_nodes": options.nodes}
    resources = _resources(options)
    if resources:
        content["resources"] = resources
    plain = {key: value for key, value in RAY_SETTINGS.items() if key != "RAY_AUTH_MODE"}
    content["envs"] = {**plain, **options.environment}
    content["secrets"] = Note("values come from the shell that submits", dict.fromkeys((TOKEN, *options.secrets)))
    content["file_mounts"] = {f"{HOME}/{part}": f"./{part}" for part in parts}
    if options.shared:
        content["volumes"] = Note("run folder and models", dict(options.shared))
    if options.setup:
        content["setup"] = "".join(f"{line}\n" for line in options.setup)
    content["run"] = Note("the same on every node; the first one is Ray's head and executes the run", _script(options))
    header = f"Run {run.name} with SkyPilot. Written by `stillhouse submit --to skypilot`."
    return dump(content, header=header)


def _resources(options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {
        "infra": options.infra,
        "accelerators": options.accelerators,
        "cpus": options.cpus,
        "memory": options.memory,
        "disk_size": options.disk_gb,
        "image_id": options.image,
        "use_spot": options.use_spot or None,
    }
    if options.managed:
        codes = [Preempted.exit_code]
        recovery = {"max_restarts_on_errors": options.max_restarts, "recover_on_exit_codes": codes}
        found["job_recovery"] = Note("75 (saved, then stopped): always; anything else: so often", recovery)
    return {name: value for name, value in found.items() if value is not None}


def _script(options: Options) -> str:
    python = options.python
    train = shlex.join([python, *COMMAND])
    return f"""set -u
cd {HOME} || exit 2
umask 077
export PYTHONPATH="$PWD/code${{PYTHONPATH:+:$PYTHONPATH}}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/ray_token"
printf %s "${TOKEN}" > "$RAY_AUTH_TOKEN_PATH"
unset RAY_ADDRESS {TOKEN}
head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
    # ends when the head does, which says how the run went
    {python} -m launch.ray_node join "$head" {RAY_PORT} --timeout-s {options.start_timeout_s} || echo "Ray ended: $?"
    exit 0
fi
{python} -m launch.ray_node head "$head" {RAY_PORT} {CLIENT_PORT} &
ray=$!
driver=""
trap 'kill -TERM "$driver" 2>/dev/null' TERM INT
until (exec 3<> "/dev/tcp/$head/{RAY_PORT}") 2>/dev/null; do
    kill -0 "$ray" 2>/dev/null || {{ echo "Ray's head did not start: see above" >&2; exit 4; }}
    sleep 1
done
RAY_ADDRESS="$head:{RAY_PORT}" {train} --wait-for-nodes "$SKYPILOT_NUM_NODES" &
driver=$!
while kill -0 "$driver" 2>/dev/null; do wait "$driver"; done
wait "$driver"
code=$?
kill -TERM "$ray" 2>/dev/null
wait "$ray"
exit "$code"
"""
