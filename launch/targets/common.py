"""What several targets share: options, checks of a run that has to travel, templates, and commands of schedulers."""

from __future__ import annotations

import codecs
import ipaddress
import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from cluster.lifecycle.ray_session import RAY_SETTINGS
from cluster.placement.hardware import gpu_memory_bytes
from cluster.placement.memory.verdict import Offer
from configs.refusal import refusal
from configs.section import Section
from launch import templates
from launch.jobs import ending_file
from trainer.errors import ConfigError, InfrastructureError

if TYPE_CHECKING:
    from configs.schema import Run
    from launch.bundle import Bundle

COMMAND = ("-m", "launch", "train", "run.yaml")
"""What a job executes with its Python, in the bundle's folder."""

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
COMMAND_TIMEOUT_S = 60

Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Python = Annotated[str, Field(pattern=r"^[^\s'\"]+$")]
Line = Annotated[str, Field(pattern=r"^[^\r\n]*$")]


class Unreachable(ConfigError):
    """No answer. An address that answered a moment ago may only be busy."""


class NotFound(InfrastructureError):
    """The cluster does not know what was asked for."""


class WithEnvironment(Section):
    """Options of a target whose job description is read by others, so that no secret may stand in it."""

    INSTEAD_OF_A_SECRET: ClassVar[str]  # how to hand one over; {name} is the variable
    RESERVED: ClassVar[str] = r"(?!)"  # variables that `submit` sets

    environment: dict[Variable, str] = Field({}, description="Variables of every process; no secrets.")

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if SECRET_NAME.search(name):
                raise refusal((name,), "...", f"looks like a secret: {cls.INSTEAD_OF_A_SECRET.format(name=name)}")
            if re.fullmatch(cls.RESERVED, name):
                raise refusal((name,), value, "is set by submit itself; remove it")
        return environment


def train_command(run: Run, job: str) -> tuple[str, ...]:
    """What a job executes with its Python, in the bundle's folder."""
    assert run.folder is not None
    return (*COMMAND, "--ending", str(ending_file(run.folder, job)))


def refuse_in_process(run: Run, kind: str) -> None:
    """Raises `ConfigError` for a run that is one process and could use no node."""
    if run.runtime == "in_process":
        raise ConfigError(
            f"runtime: in_process is one process, and --to {kind} starts nodes for it: write runtime: ray"
        )


def offer_of(where: str, gpus: Sequence[str], *, host_bytes: int | None) -> Offer:
    """Of machines with GPUs of these kinds; "" for a kind that is not known."""
    sizes = [gpu_memory_bytes(kind) for kind in gpus]
    return Offer(where, tuple(gpus), None if None in sizes else max(sizes, default=None), host_bytes)


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def bytes_of(text: str, *, plain: str = "") -> int:
    """`64G`, `64Gi`; a number alone is in units of `plain`."""
    found = re.fullmatch(r"(\d+)([KMGT]?)i?\+?", text)
    assert found is not None, text
    return int(found[1]) * _UNITS[found[2] or plain]


def note_of_paths_outside(run: Run, mount: str) -> str:
    """For the shipment's note: model paths that are not below `mount`. Raises `ConfigError` where the run folder is
    not."""
    root = Path(mount)
    assert run.folder is not None
    if not run.folder.is_relative_to(root):
        raise ConfigError(
            f"folder: the run folder {run.folder} is not on what the nodes share, which they have at {mount}: write "
            f"--set folder={root / 'runs' / run.name}"
        )
    paths = [*(teacher.model.path for teacher in run.teachers_by_name().values()), run.student.model.path]
    outside = [path for path in paths if path.startswith("/") and not Path(path).is_relative_to(root)]
    return f" Not on the volume, so the image must hold it: {', '.join(outside)}." if outside else ""


def render(template: str, **values: Any) -> str:
    """A template beside this file, with two filters: `sh` quotes a text for a shell, `yaml` writes a value as YAML."""
    return templates.render(Path(__file__).with_name(template), {"sh": shlex.quote, "yaml": _yaml}, **values)


def _yaml(value: Any) -> str:
    """JSON, which every reader of YAML takes for what it is; of a mapping without the keys that have no value."""
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    return json.dumps(value, ensure_ascii=False)


def ray_environment() -> dict[str, str]:
    """What the processes of a Ray cluster start with, without its authentication, which each target sets itself."""
    return {name: value for name, value in RAY_SETTINGS.items() if name != "RAY_AUTH_MODE"}


def run_command(*command: str, kind: str, lost: str, given: str | None = None) -> str:
    """The output of a command of a scheduler. Raises `ConfigError` with its error output where it fails, and
    `InfrastructureError` where that matches `lost`, or the command does not end in time: the scheduler is down."""
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise missing_command(kind, command[0]) from None
    except subprocess.TimeoutExpired:
        raise InfrastructureError(f"{command[0]} did not answer within {COMMAND_TIMEOUT_S} s") from None
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
    text = f"{shlex.join(command)}: {said}"
    raise InfrastructureError(text) if re.search(lost, said) else ConfigError(text)


def missing_command(kind: str, name: str) -> ConfigError:
    return ConfigError(
        f"--to {kind}: there is no {name} on this machine. --dry-run prints the YAML or script without it; submit from "
        "a machine that has it, such as a login node"
    )


def wait_until(over: Callable[[], bool], *, seconds: float, poll_s: float) -> bool:
    """Whether something came true in time."""
    deadline = time.monotonic() + seconds
    while not over():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True


def follow_file(file: Path, *, over: Callable[[], bool], poll_s: float) -> Iterator[str]:
    """The text in a file, and what is added to it until `over`. The file may not be there yet; it is opened anew each
    time, as shared file systems need it."""
    decoder, position = codecs.getincrementaldecoder("utf-8")("replace"), 0
    while True:
        last = over()  # before reading, so that the end is read too
        if file.exists():
            with file.open("rb") as output:
                output.seek(position)
                while piece := output.read(1 << 16):
                    position += len(piece)
                    yield decoder.decode(piece)
        if last:
            return
        time.sleep(poll_s)


def write_files(folder: Path, files: Mapping[str, str | Path]) -> None:
    """A new folder that only its owner reads, with the files of a shipment."""
    folder.mkdir(mode=0o700, parents=True)
    for name, source in files.items():
        if isinstance(source, str):
            (folder / name).write_text(source, encoding="utf-8")
        else:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)


def parts_of(bundle: Bundle, names: Sequence[str]) -> dict[str, Path]:
    """Of files and folders of a bundle, those that are there."""
    return {name: bundle.folder / name for name in names if (bundle.folder / name).exists()}


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
