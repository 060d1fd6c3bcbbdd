"""`stillhouse doctor`: is this machine, or this cluster, fit for a run? One line a thing: ok, or what to do.

this machine   software, models, machine      each question with a deadline of its own
the cluster    every node and the network     a deadline between two findings, since joining may hang inside Ray
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cluster.lifecycle.ray_session import RayCluster, start_ray, stop_ray
from cluster.placement.hardware import Hardware
from cluster.preflight import machine, software
from cluster.preflight.finding import Finding, Silence, bounded, examine, ok, problem
from cluster.preflight.machine import Needs
from configs.load import load_run, run_folder
from configs.schema import Run
from launch.check.needs import needs_of
from trainer.errors import StillhouseError
from trainer.imports import uncollected

if TYPE_CHECKING:
    from launch.model_folder import ModelFacts

JOIN_TIMEOUT_S = 90.0
"""Until the cluster has been joined: imports, and the 20 s that Ray takes to find a token wrong."""

SILENCE_TIMEOUT_S = 300.0
"""Between two findings about a cluster: more than its questions take together, each with a shorter deadline."""

COLOURS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}
SUBJECT_WIDTH = 15
CLUSTER = "the cluster"


def doctor(path: Path | None, overrides: Sequence[str], *, address: str | None) -> int:
    """Print what is found. 0: no problems (perhaps warnings); 1: problems. Raises `ConfigError` for a configuration
    that cannot be read."""
    run = None if path is None else load_run(path, overrides).run
    facts: dict[str, ModelFacts] = {}
    address = address or os.environ.get("RAY_ADDRESS") or None
    sheet = Sheet()
    here = f"this machine ({os.uname().nodename})"
    needs = Needs(run_folder=str(Path.cwd())) if run is None else needs_of(run)
    for finding in examine(software.looks(needs_vllm=needs.vllm, extras=needs.extras)):
        sheet.add(here, finding)
    if run is not None:
        facts, models, needs = look_at_models(run, needs)
        for finding in models if address else (*models, *memory_of(run, facts, None)):
            sheet.add(here, finding)
    own = replace(needs, several_nodes=address is not None, ray="running" if address else "by_hand")
    own = own if address is None else replace(own, object_store_bytes=None)
    for finding in examine(machine.looks(own, os.environ)):
        sheet.add(here, finding)
    if address is None:
        return sheet.end()
    found = bounded(look_at_cluster(address, needs, run, facts), first_s=JOIN_TIMEOUT_S, then_s=SILENCE_TIMEOUT_S)
    try:
        for where, finding in found:
            sheet.add(where, finding)
    except Silence as silence:
        sheet.add(CLUSTER, _silent(address, silence))
        sheet.end()
        sys.stdout.flush()
        os._exit(1)  # a thread waits inside Ray, and leaving Ray would wait for it
    return sheet.end()


def look_at_models(run: Run, needs: Needs) -> tuple[dict[str, ModelFacts], list[Finding], Needs]:
    """As `check` looks at them: what is known of them, the findings, and the needs with the disk that the student's
    size asks for."""
    with uncollected():
        from launch.check.models import examine_models
    from launch.disk import DiskNeed
    from launch.quiet import quiet_libraries

    quiet_libraries()
    facts, found = examine_models(run)
    student = facts.get("student")
    if student is None:
        return facts, found, needs
    return facts, found, replace(needs, disk_bytes=DiskNeed.of(run, student).bytes_to_come(run_folder(run)))


def memory_of(run: Run, facts: Mapping[str, ModelFacts], cluster: Hardware | None) -> Iterator[Finding]:
    """What the run needs beside what a cluster has, or this machine."""
    from cluster.placement.memory.verdict import Offer
    from launch.check.memory import examine_memory, offer_here

    offer = offer_here(run) if cluster is None else Offer.of(cluster, CLUSTER)
    found = examine_memory(run, facts, offer=offer)
    yield from (finding for finding in found if finding.status != "not checked")  # the models say why


def look_at_cluster(
    address: str, needs: Needs, run: Run | None, facts: Mapping[str, ModelFacts]
) -> Iterator[tuple[str, Finding]]:
    try:
        cluster = start_ray(num_cpus=0, address=address)
    except StillhouseError as error:
        text, _, advice = str(error).partition(". ")
        yield CLUSTER, problem("joining", text, advice or "check the address")
        return
    from cluster.preflight.members import examine_members

    yield CLUSTER, joined(cluster)
    yield from examine_members(needs, warnings=cluster.warnings)
    if run is not None:
        yield from ((CLUSTER, finding) for finding in memory_of(run, facts, Hardware.of_ray()))
    stop_ray(cluster)


def joined(cluster: RayCluster) -> Finding:
    import ray

    return ok("joining", f"joined {cluster.address} from node {ray.get_runtime_context().get_node_id()[:8]}")


def _silent(address: str, silence: Silence) -> Finding:
    advice = "on a node of the cluster see `ray status`, and the logs in /tmp/ray/session_latest"
    return problem("doctor", f"{address}: {silence}", advice)


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
        counted = [f"{n} {status}{'s' if n > 1 else ''}" for status, n in self.counts.items() if n and status != "ok"]
        typer.echo("\n" + (", ".join(reversed(counted)) or "nothing to complain of"))
        return 1 if self.counts["problem"] else 0
