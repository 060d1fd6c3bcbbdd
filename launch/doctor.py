"""`stillhouse doctor`: is this machine, or this cluster, fit for a run? One line a thing: ok, or what to do.

software, machine, models   here, each look with a deadline        cluster/preflight/{software,machine}.py
cluster                     in a child process that can be killed  launch/doctor_cluster.py -> cluster/preflight/
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer

from cluster.lifecycle.ray_session import object_store_bytes
from cluster.preflight import machine, software
from cluster.preflight.finding import Finding, Look, examine, ok, problem, warning
from configs.engines import Vllm
from configs.load import load_run, run_folder
from configs.models import ModelSource
from configs.rules import teachers_by_place
from configs.schema import Run
from launch.identity import HOME
from trainer.errors import StillhouseError

JOIN_TIMEOUT_S = 90.0
"""Until the cluster has been joined: imports, and the 20 s that Ray takes to find a token wrong."""

SILENCE_TIMEOUT_S = 180.0
"""Between two findings about a cluster; every question to it has a shorter deadline of its own."""

MODELS_TIMEOUT_S = 60.0
COLOURS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}
SUBJECT_WIDTH = 15


def doctor(path: Path | None, overrides: Sequence[str], *, address: str | None) -> int:
    """Print what is found. 0: no problems (perhaps warnings); 1: problems. Raises `ConfigError` for a configuration
    that cannot be read."""
    run = None if path is None else load_run(path, overrides).run
    address = address or os.environ.get("RAY_ADDRESS") or None
    sheet = Sheet()
    here = f"this machine ({os.uname().nodename})"
    needs = _needs(run)
    for finding in examine(software.looks(needs_vllm=needs.vllm)):
        sheet.add(here, finding)
    if run is not None:
        for finding in examine([Look("models", lambda: models(run))], timeout_s=MODELS_TIMEOUT_S):
            sheet.add(here, finding)
    circumstances = machine.Circumstances(
        run_folder=None if run is None else run_folder(run).absolute(),
        disk_bytes=needs.disk_bytes,
        object_store_bytes=None if address else needs.object_store_bytes,
        in_cluster=address is not None,
        several_nodes=address is not None,
    )
    for finding in examine(machine.looks(circumstances, os.environ)):
        sheet.add(here, finding)
    if address is not None:
        for where, finding in ask_cluster(address, run, needs):
            sheet.add(where, finding)
    return sheet.end()


@dataclass(slots=True)
class Sheet:
    """What is printed: findings under headings, aligned, and a count."""

    heading: str = ""
    counts: dict[str, int] = field(default_factory=lambda: {"ok": 0, "warning": 0, "problem": 0})

    def add(self, where: str, finding: Finding) -> None:
        if where != self.heading:
            typer.secho(("\n" if self.heading else "") + where, bold=True)
            self.heading = where
        self.counts[finding.status] += 1
        typer.secho(f"{finding.status:<8}", fg=COLOURS[finding.status], nl=False)
        typer.echo(f"  {finding.subject:<{SUBJECT_WIDTH}}  {finding.text}")
        if finding.advice:
            typer.echo(f"{'':<8}  {'':<{SUBJECT_WIDTH}}  -> {finding.advice}")

    def end(self) -> int:
        counted = [_count(self.counts[status], status) for status in ("problem", "warning") if self.counts[status]]
        typer.echo("\n" + (", ".join(counted) or "nothing to complain of"))
        return 1 if self.counts["problem"] else 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run asks of a machine; None and True where no configuration says."""

    vllm: bool = True
    disk_bytes: int | None = None
    object_store_bytes: int | None = None
    models: tuple[tuple[str, str | None], ...] = ()


def _needs(run: Run | None) -> Needs:
    if run is None:
        return Needs()
    teachers = run.teachers_by_name().values()
    sources = (*(teacher.model for teacher in teachers), run.student.model)
    return Needs(
        vllm=any(isinstance(replicas.engine, Vllm) for teacher in teachers for replicas in teacher.roles().values()),
        disk_bytes=_disk_bytes(run),
        object_store_bytes=object_store_bytes(run.training.max_label_bytes),
        models=tuple((source.path, source.revision) for source in sources),
    )


def _disk_bytes(run: Run) -> int | None:
    """What the run will write beyond what lies there; None where the student is no folder that can be read, which
    `models` says."""
    if not Path(run.student.model.path).expanduser().is_dir():
        return None
    from launch.disk import DiskNeed
    from launch.model_folder import read_facts

    try:
        facts = read_facts(run.student.model, path_name="student.model", student=run.student)
        return DiskNeed.of(run, facts).bytes_to_come(run_folder(run))
    except StillhouseError:
        return None


def models(run: Run) -> list[Finding]:
    """Folders that are whole and hold safetensors; names of the hub are looked up in its cache only."""
    found = []
    sources = {place: teacher.model for place, teacher in teachers_by_place(run).items()}
    for role, source in (sources | {"student": run.student.model}).items():
        found.append(_model(f"{role} model", source, path_name=f"{role}.model.path"))
    return found


def _model(subject: str, source: ModelSource, *, path_name: str) -> Finding:
    from launch.model_folder import find_model, refuse_code_of_others

    try:
        where = find_model(source, path_name=path_name, needs_weights=True)
        refuse_code_of_others(source, path_name=path_name)
    except StillhouseError as error:
        text, _, advice = str(error).partition("; ")
        return problem(subject, text, advice or "make or copy it here, or name another")
    if source.trust_remote_code:
        advice = "read its code, or trust_remote_code: false"
        return warning(subject, f"{source.path} runs code of its own (trust_remote_code)", advice)
    return ok(subject, f"{source.path}, {'safetensors' if where == 'folder' else 'from the hub'}")


def ask_cluster(address: str, run: Run | None, needs: Needs) -> Iterator[tuple[str, Finding]]:
    """Findings of the child, as they come; where it stays silent, one that says so, and the child is killed."""
    question = {
        "address": address,
        "run_folder": None if run is None else str(run_folder(run).absolute()),
        "disk_bytes": needs.disk_bytes,
        "models": needs.models,
        "needs_vllm": needs.vllm,
    }
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "launch.doctor_cluster"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))},
        )
        try:
            yield from _listen(child, json.dumps(question), address)
            if child.wait(timeout=30) != 0:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["nothing"])[-1]
                yield (
                    "the cluster",
                    problem("doctor", f"its process ended, saying: {last[-300:]}", "please report this"),
                )
        except subprocess.TimeoutExpired:
            yield "the cluster", warning("doctor", "its process does not leave the cluster", "it was killed")
        finally:
            child.kill()
            child.wait()


def _listen(child: subprocess.Popen[str], question: str, address: str) -> Iterator[tuple[str, Finding]]:
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in child.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    child.stdin.write(question + "\n")
    child.stdin.close()
    joined = False
    while True:
        timeout_s = SILENCE_TIMEOUT_S if joined else JOIN_TIMEOUT_S
        started = time.monotonic()
        try:
            line = lines.get(timeout=timeout_s)
        except queue.Empty:
            child.kill()
            waited = f"no answer for {time.monotonic() - started:.0f} s"
            if joined:
                yield (
                    "the cluster",
                    problem("doctor", waited, "see `ray status` and the logs in /tmp/ray/session_latest"),
                )
            else:
                advice = (
                    "run it on a node of the cluster: ray job submit --address http://HEAD:8265 -- stillhouse doctor"
                )
                text = f"{address}: {waited}; a process that is on no node of a cluster cannot join it"
                yield "the cluster", problem("joining", text, advice)
            return
        if not line:
            return
        said = json.loads(line)
        where = said.pop("where")
        joined = True
        yield where, Finding(**said)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
