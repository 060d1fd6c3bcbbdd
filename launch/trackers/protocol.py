"""What a tracker is: the contract between the follower of a run and one kind, built-in or of a user's.

A kind is a file with a class `Tracker` that derives from its parameters (`configs.trackers.TrackerChoice`, where a user
declares own fields) and has `reach` and `begin`. Both may raise anything; the run goes on, and is told the error once.
Its library is imported inside of them: the file itself is read on machines that have none. All calls come from one
thread of a process that does nothing else, so they may take their time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a tracker is told of a run."""

    id: str  # the same when the run goes on, another when it starts afresh
    name: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)  # all settings, as in config.yaml; holds no secret


@dataclass(frozen=True, slots=True)
class Point:
    """A line of metrics.jsonl: numbers of one step, by the names of docs/metrics.md. They need not be finite."""

    kind: Literal["step", "evaluation"]
    step: int
    time_s: float  # Unix time
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended (docs/exit-codes.md), and what it came to."""

    code: int
    reason: str
    summary: Mapping[str, float] = field(default_factory=dict)


class TrackedRun(Protocol):
    """A run at a tracker, begun or gone on with."""

    where: str
    """Where a person looks at it: an address, or the command that shows it."""
    held: int | None
    """The last step whose points it has from earlier, -1 for none; None where it cannot tell, and what was sent before
    is taken to have arrived."""

    def log(self, points: Sequence[Point]) -> None:
        """In the order of their steps; an evaluation comes after its step. What raises is sent again."""
        ...

    def rewind(self, step: int) -> bool:
        """The run goes on after `step`. True: what was logged after it is taken back, and comes again. False: that
        cannot be done, and steps that are there are not sent a second time."""
        ...

    def close(self, ending: Ending | None) -> None:
        """Everything was logged. None: the run's process is gone, and nobody knows why."""
        ...


class TrackerKind(Protocol):
    """The class `Tracker` of a kind's file."""

    def reach(self) -> None:
        """Raise where nobody answers, or who asks is not known there: for `stillhouse check`, within seconds."""
        ...

    def begin(self, run: RunFacts) -> TrackedRun:
        """Begin a run, or go on with the one of the same id."""
        ...
