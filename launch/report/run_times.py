"""`stillhouse bench start` and `bench waits`: what a run's own records say about its time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from rich.table import Table
from ruamel.yaml import YAML

from launch.report.metrics import TOKENS_PER_S, read_metrics
from launch.report.timeline import LaneShare, read_timeline, wait_shares
from trainer.errors import ConfigError
from trainer.run_folder import RunFolder, read_json

FIRST_STEP = "training"
"""The phase of launch/train.py whose first step ends what is called the start."""


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    began_s: float  # after the command
    seconds: float
    parts: tuple[tuple[str, float], ...] = ()  # seconds of what went on at the same time


@dataclass(frozen=True, slots=True)
class Waits:
    depth: int
    tokens_per_s: float  # median over the steps
    shares: tuple[LaneShare, ...]


def start_phases(folder: RunFolder) -> tuple[Phase, ...]:
    """From the command to the end of its first trained step; of a resumed run, those of its last attempt.

    Raises `ConfigError` for a folder whose run has not come that far.
    """
    if not folder.manifest.exists():
        raise ConfigError(f"{folder.path} is no run folder: it has no {folder.manifest.name}")
    manifest = read_json(folder.manifest)
    began = manifest.get("phases_began_s", {})
    if FIRST_STEP not in began:
        raise ConfigError(f"{folder.path}: this run never came to its first step; look at {folder.exit.name} and logs/")
    names = list(began)[: list(began).index(FIRST_STEP) + 1]
    # `started` (wall clock) and the beginning of the second phase (seconds after the command) are one moment.
    command = manifest["started"] - began[names[1]]
    spans = read_timeline(folder)
    trained = [s.stop_s - command for s in spans if s.kind == "train" and s.stop_s - command > began[FIRST_STEP]]
    if not trained:
        raise ConfigError(f"{folder.path}: no step of this run is on record yet")
    edges = [*(began[name] for name in names), min(trained)]
    phases = []
    for name, (start, stop) in zip(names, pairwise(edges), strict=True):
        inside = [s for s in spans if s.kind == "start" and start - 1 <= s.start_s - command <= stop]
        parts = tuple((f"{s.lane} is up", s.stop_s - s.start_s) for s in inside)
        phases.append(Phase("training the first step" if name == FIRST_STEP else name, start, stop - start, parts))
    return tuple(phases)


def start_table(phases: tuple[Phase, ...]) -> Table:
    end = phases[-1].began_s + phases[-1].seconds
    table = Table(title=f"From the command to the end of the first step: {end:.1f} s")
    table.add_column("phase")
    table.add_column("began at", justify="right")
    table.add_column("seconds", justify="right")
    for phase in phases:
        table.add_row(phase.name, f"{phase.began_s:.1f}", f"{phase.seconds:.1f}")
        for name, seconds in phase.parts:
            table.add_row(f"  {name}", "", f"({seconds:.1f})")
    return table


def read_waits(folder: RunFolder) -> Waits:
    """Busy and waiting shares at steady state (`launch/report/timeline.py` says which that is).

    Raises `ConfigError` for a run with too few steps.
    """
    shares = wait_shares(read_timeline(folder))
    if not shares:
        raise ConfigError(f"{folder.path}: too few steps for a steady state; a run of ten says something")
    speeds = [s.values[TOKENS_PER_S] for s in read_metrics(folder).steps if TOKENS_PER_S in s.values]
    depth = YAML(typ="safe", pure=True).load(folder.config)["training"]["depth"]
    return Waits(depth=depth, tokens_per_s=median(speeds), shares=shares)


def waits_table(waits: Waits) -> Table:
    table = Table(
        title=f"Steady state at depth {waits.depth}: {waits.tokens_per_s:,.0f} tokens/s (median of the steps)"
    )
    table.add_column("lane")
    for column in ("busy", "waiting", "busy with"):
        table.add_column(column, justify="right")
    for share in waits.shares:
        kinds = ", ".join(
            f"{kind} {value:.0%}" for kind, value in share.kinds.items() if kind != "wait" and value >= 0.005
        )
        table.add_row(share.lane, f"{share.busy:.0%}", f"{share.waiting:.0%}", kinds)
    return table
