"""What to do when something died, hangs or fails, and which replica gets the next unit. Pure: the callers wait and act.

A restart budget counts failures *without progress in between*: a run of weeks may lose a node every day, but a rank
that dies again at once is not going to recover.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from configs.schema import Faults

FailureKind = Literal[
    "students_lost",  # a rank died, or all of them hang
    "teacher_died",
    "teacher_hung",
    "unit_failed",  # the infrastructure's fault: the replica died, or the deadline passed
    "unit_refused",  # the data's fault: a replica cannot score this unit, or its labels are not finite
]

BACKOFF_FIRST_S = 1.0
BACKOFF_LONGEST_S = 30.0


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure of one rank group, replica or unit."""

    kind: FailureKind
    count: int  # failures of it so far, this one included
    progress_since_last: bool = False  # something was gained since the one before, so the count begins again


@dataclass(frozen=True, slots=True)
class RestartGroup:
    """Kill every student rank and start new ones, from the last committed checkpoint."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class RestartReplica:
    delay_s: float
    count: int  # what the caller remembers as its count


@dataclass(frozen=True, slots=True)
class RetryUnit:
    """On a replica that has not refused it."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The unit, the replica, the group or the run is lost."""

    reason: str


Decision = RestartGroup | RestartReplica | RetryUnit | GiveUp


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """Budgets of a run. `decide` has no memory: equal failures get equal decisions."""

    max_restarts: int  # of the group, or of each replica, without progress in between
    max_attempts: int = 5  # of a unit whose replica failed
    max_refusals: int = 2  # of a unit that replicas refuse: a second opinion, then it is the data

    @classmethod
    def of_students(cls, faults: Faults) -> FailurePolicy:
        return cls(max_restarts=faults.max_student_restarts, max_attempts=faults.max_unit_attempts)

    @classmethod
    def of_teachers(cls, faults: Faults) -> FailurePolicy:
        return cls(max_restarts=faults.max_teacher_restarts, max_attempts=faults.max_unit_attempts)

    def decide(self, failure: Failure) -> Decision:
        count = 1 if failure.progress_since_last else failure.count
        assert count >= 1, failure
        match failure.kind:
            case "students_lost":
                if count > self.max_restarts:
                    return GiveUp(f"the student group failed {count} times without a new step or checkpoint in between")
                return RestartGroup(_group_delay_s(count))
            case "teacher_died" | "teacher_hung":
                if count > self.max_restarts:
                    return GiveUp(f"the replica failed {count} times without scoring a unit in between")
                return RestartReplica(backoff_s(count), count)
            case "unit_failed":
                if count >= self.max_attempts:
                    return GiveUp(f"the unit failed on {count} attempts")
                return RetryUnit(backoff_s(count))
            case "unit_refused":
                if count >= self.max_refusals:
                    return GiveUp(f"{count} attempts were refused")
                return RetryUnit(0.0)


def backoff_s(count: int) -> float:
    """1, 2, 4, ... 30 s: a replacement node takes 13-18 s to be usable."""
    return min(BACKOFF_LONGEST_S, BACKOFF_FIRST_S * 2.0 ** min(count - 1, 16))


def _group_delay_s(count: int) -> float:
    """The first restart at once: the placement is there, and starting takes longer than most waits."""
    return 0.0 if count == 1 else backoff_s(count - 1)


@dataclass(frozen=True, slots=True)
class PlacedProcess:
    """One process of a role and the node it sits on."""

    role: str  # "student-0", "scorer-1"
    node: str


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """How busy a replica is."""

    name: str
    tokens_in_flight: int
    units_in_flight: int
    healthy: bool = True


def choose_replica(loads: Sequence[ReplicaLoad], *, credits: int, exclude: Collection[str] = ()) -> str | None:
    """The healthy replica with the fewest tokens in flight, among those with less than `credits` units; None: wait.

    `exclude` holds replicas that have refused the unit. Ties go to fewer units, then to the first.
    """
    able = [load for load in loads if load.healthy and load.units_in_flight < credits and load.name not in exclude]
    best = min(able, key=lambda load: (load.tokens_in_flight, load.units_in_flight), default=None)
    return None if best is None else best.name
