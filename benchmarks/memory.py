"""`python -m benchmarks memory`: what each process of a run had in memory at its peak, beside what `check` predicts.

The run is started as a user starts it, in a folder of its own; twice a second every process below it is asked for its
proportional set size (Linux: shared pages count in equal parts for all who have them). Whose process it is says the
log that its output goes to. Nothing in the run knows that it is measured.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from cluster.placement.choices import DtypeRule
from cluster.placement.hardware import Hardware
from cluster.placement.memory import verdict
from cluster.placement.memory.needs import memory_needs
from cluster.placement.memory.parts import RoleMemory
from cluster.preflight.machine import size_text
from cluster.runtime import CONTROLLER, CPU
from configs.load import load_run
from launch.check.memory import known_sizes
from launch.check.models import examine_models, label_bytes
from launch.quiet import quiet_libraries
from trainer.errors import InfrastructureError
from trainer.loop.inputs import read_inputs

EVERY_S = 0.5
RAY = "Ray"
_LOG = re.compile(r"/logs/(?P<role>.+)-\d+\.log$")


@dataclass(slots=True)
class Peaks:
    """Bytes: by role of each of its processes, of all processes of Ray together, and of everything together."""

    processes: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    ray: int = 0
    together: int = 0

    def add(self, now: dict[tuple[str, int], int]) -> None:
        """One look at all processes."""
        for (role, pid), size in now.items():
            self.processes[role][pid] = max(size, self.processes[role].get(pid, 0))
        self.ray = max(self.ray, sum(size for (role, _), size in now.items() if role == RAY))
        self.together = max(self.together, sum(now.values()))

    def of(self, role: str) -> int | None:
        """Of the process that had most."""
        if role == RAY:
            return self.ray or None
        return max(self.processes[role].values(), default=None)


@dataclass(frozen=True, slots=True)
class Compared:
    """One role."""

    role: str
    processes: int
    predicted: int
    measured: int | None
    own: int | None  # of `measured`, what is left without the parts that were predicted by formula

    @property
    def ratio(self) -> float | None:
        return None if self.measured is None else self.predicted / self.measured


@dataclass(frozen=True, slots=True)
class MemoryResult:
    compared: tuple[Compared, ...]
    predicted: int
    together: int
    seconds: float

    def table(self) -> Table:
        table = Table(title=f"Peak of the proportional set size, {self.seconds:.0f} s, every {EVERY_S} s")
        for name in ("role", "processes", "predicted", "measured", "predicted / measured", "process alone"):
            table.add_column(name, justify="left" if name == "role" else "right")
        for one in self.compared:
            numbers = [_text(one.predicted), _text(one.measured), f"{one.ratio:.2f}" if one.ratio else "-"]
            table.add_row(one.role, str(one.processes), *numbers, _text(one.own))
        ratio = f"{self.predicted / self.together:.2f}"
        table.add_row("together", "", size_text(self.predicted), size_text(self.together), ratio, "", style="bold")
        return table

    def to_json(self) -> dict[str, Any]:
        roles = {
            one.role: {"predicted": one.predicted, "measured": one.measured, "process_alone": one.own}
            for one in self.compared
        }
        return {"roles": roles, "predicted": self.predicted, "together": self.together}


def measure(config: Path, overrides: Sequence[str], work: Path) -> MemoryResult:
    """Predict, run, compare. Raises `InfrastructureError` where the run fails; its output is in `work`."""
    quiet_libraries()
    roles = predicted(config, overrides)
    started = time.monotonic()
    peaks = watch(config, overrides, work)
    return MemoryResult(
        compared=tuple(_compared(roles, peaks)),
        predicted=verdict.host_bytes(roles),
        together=peaks.together,
        seconds=time.monotonic() - started,
    )


def predicted(config: Path, overrides: Sequence[str]) -> tuple[RoleMemory, ...]:
    """As `check` says it of this machine without its GPUs."""
    run = load_run(config, overrides).run
    facts, found = examine_models(run)
    if problems := [finding.message for finding in found if finding.fatal]:
        raise InfrastructureError(problems[0])
    row_bytes: list[int] = []
    list(label_bytes(run, read_inputs(run), row_bytes))
    known = known_sizes(run, facts, label_bytes=sum(row_bytes))
    assert known is not None
    return memory_needs(run, known, DtypeRule.of(Hardware.local(), CPU))


def watch(config: Path, overrides: Sequence[str], work: Path) -> Peaks:
    """Start the run and look at its processes until it ends."""
    sets = [part for text in (*overrides, f"folder={work / 'run'}", "accelerator=cpu") for part in ("--set", text)]
    peaks = Peaks()
    with (work / "output.log").open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "launch", "train", str(config), *sets],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            while run.poll() is None:
                peaks.add(look(run.pid))
                time.sleep(EVERY_S)
        finally:
            run.terminate()
            run.wait()
    if run.returncode:
        raise InfrastructureError(f"the run ended with {run.returncode}; its output is {work / 'output.log'}")
    return peaks


def look(root: int) -> dict[tuple[str, int], int]:
    """(role, pid) -> bytes, of a process and all below it."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for process in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                role = CONTROLLER if process.pid == root else role_of(process.pid)
                found[role, process.pid] = pss(process.pid)
    return found


def role_of(pid: int) -> str:
    """By the log that a process writes to; what writes elsewhere is Ray's, or the controller's help."""
    written = _LOG.search(os.readlink(f"/proc/{pid}/fd/1"))
    return written["role"] if written else RAY


def pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)[1]) * 1024


def _compared(roles: Sequence[RoleMemory], peaks: Peaks) -> list[Compared]:
    rows = []
    for role in roles:
        own = {part.name: part.num_bytes for part in role.host}
        if role.role == CONTROLLER:  # Ray's processes are a line of their own
            ray = own.pop(RAY)
            rows.append(_row(RAY, 1, ray, peaks.of(RAY), 0))
        predicted = sum(own.values())
        rows.append(_row(role.role, role.processes, predicted, peaks.of(role.role), predicted - own["process"]))
    return rows


def _row(role: str, processes: int, predicted: int, measured: int | None, parts: int) -> Compared:
    return Compared(role, processes, predicted, measured, None if measured is None else measured - parts)


def _text(size: int | None) -> str:
    return "-" if size is None else size_text(size)
