"""Where a run can be sent, one file per kind: `stillhouse submit --to ray` is `launch/targets/ray.py`.

A file holds a class `Target` with the members of the protocol below, made without arguments. Importing it must not
import Ray or connect to anything: `prepare` works on a laptop without network, and `--dry-run` prints what it returns.

    bundle -> prepare -> Shipment (what would be sent) -> submit -> JobRecord (kept beside the run, found by its name)
                            `--dry-run` stops here                      status, logs, stop, fetch
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field, ValidationError

from configs.refusal import did_you_mean
from configs.section import NAME, Section
from configs.stations import import_plugin
from trainer.errors import ConfigError, Preempted
from trainer.records import Moment

if TYPE_CHECKING:
    from cluster.placement.memory.verdict import Offer
    from launch.bundle import Bundle

KINDS = ("kuberay", "local", "ray", "skypilot", "slurm")

State = Literal["pending", "running", "succeeded", "failed", "stopped", "preempted", "unknown"]
OVER: frozenset[State] = frozenset({"succeeded", "failed", "stopped", "preempted"})


def state_of(exit_code: int | None) -> State:
    """Of a run that is over; None: it was killed."""
    return {0: "succeeded", Preempted.exit_code: "preempted"}.get(exit_code, "failed")  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Shipment:
    """What is sent and what is executed; `--dry-run` prints exactly this."""

    files: Mapping[str, str | Path]  # name -> text, or a file or folder on this machine
    command: tuple[str, ...]  # what is executed where the run will be, or ()
    note: str  # for the person: where it goes, what to type
    warnings: tuple[str, ...] = ()  # what is unsafe about it; shown before it is sent


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What is stored of a submitted job: enough to find it again, and no secret."""

    job: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,49}$")]  # our id
    kind: str
    name: Annotated[str, Field(pattern=NAME)]  # of the run
    folder: str  # run folder as the job sees it
    handle: str = ""  # what the scheduler calls the job: a process id, a Slurm job id, a submission id
    options: Mapping[str, Any] = field(default_factory=dict)  # of the target, JSON types
    submitted: Moment = field(default_factory=time.time)

    @classmethod
    def of(cls, job: str, kind: str, bundle: Bundle, options: Section, *, handle: str) -> JobRecord:
        """Of a bundle that was just submitted."""
        run = bundle.run
        return cls(job, kind, run.name, str(run.folder), handle, options.model_dump(mode="json"))

    def status(
        self, state: State, exit_code: int | None = None, *, message: str = "", written: RunStatus | None = None
    ) -> JobStatus:
        """`JobStatus` of this job, with the steps that its run has `written`."""
        written = written or RunStatus()
        pace = written.pace if state == "running" else ""
        return JobStatus(
            self.job, state, exit_code, written.step, written.steps, message, self.name, self.submitted, pace
        )


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The status of a job as its run folder shows it (`launch.jobs.run_status`)."""

    step: int | None = None
    steps: int | None = None
    exit_code: int | None = None  # of the job's command, once it has ended
    reason: str = ""  # why it ended so, where it failed or was stopped
    pace: str = ""  # what is left and spent, for people


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How a job is doing."""

    job: str
    state: State
    exit_code: int | None = None  # of `stillhouse train` itself; None while it runs or where it is unknown
    step: int | None = None
    steps: int | None = None
    message: str = ""
    name: str = ""  # of the run, where the scheduler knows it
    submitted: float | None = None
    pace: str = ""  # what is left and spent, while it runs

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in OVER


class Target(Protocol):
    """A place where runs go.

    What the user got wrong raises `ConfigError`, a scheduler that does not answer `InfrastructureError`. A verb that
    a target does not have raises `ConfigError` naming the command of the scheduler to type instead. `options` is an
    instance of `Options`; the others get it from the record with `options_of`.
    """

    Options: type[Section]

    def prepare(self, bundle: Bundle, options: Any, job: str) -> Shipment:
        """What would be sent. Pure: starts nothing, connects to nothing, writes nothing."""
        ...

    def offer(self, options: Any) -> Offer | None:
        """What a run may use there, as far as the options say; None where they do not. Pure. Optional."""
        ...

    def submit(self, bundle: Bundle, shipment: Shipment, options: Any, job: str) -> JobRecord:
        """Check what can be checked, then send. Where it raises, nothing was started."""
        ...

    def status(self, record: JobRecord) -> JobStatus: ...

    def logs(self, record: JobRecord, *, follow: bool) -> Iterator[str]:
        """Pieces of the driver's output as they come, not split into lines; with `follow` until the job is over."""
        ...

    def stop(self, record: JobRecord) -> None:
        """Ask the job to save a checkpoint and end, and wait until it has. Nothing to do for one that is over."""
        ...

    def list(self, options: Any) -> list[JobStatus]:
        """Every job of Stillhouse that the scheduler still knows."""
        ...

    def fetch(self, record: JobRecord, destination: Path) -> None:
        """Bring the run's artifacts (report, metrics, student and the files beside them) to a folder here."""
        ...


def load_target(kind: str) -> Target:
    """The target of a kind, one of `KINDS` or `package.module`. Raises `ConfigError` for an unknown one, with the
    nearest."""
    try:
        if "." not in kind and kind not in KINDS:
            raise ValueError(f"unknown kind '{kind}'{did_you_mean(kind, KINDS)} (there are {', '.join(KINDS)})")
        module = import_plugin(kind) if "." in kind else importlib.import_module(f"launch.targets.{kind}")
    except ValueError as error:
        raise ConfigError(f"--to {kind}: {error}") from None
    return module.Target()


def options_of(target: Target | type[Target], record: JobRecord) -> Any:
    """The options a job was submitted with. Raises `ConfigError` where its record holds others than the target has."""
    try:
        return target.Options.model_validate(dict(record.options))
    except ValidationError as error:
        wrong = ", ".join(sorted({str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}))
        raise ConfigError(
            f"the record of {record.job} holds options of {record.kind} that this version does not take ({wrong}); "
            "submit the run again"
        ) from None
