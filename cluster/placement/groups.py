"""What is to be placed, and what placing makes of it: values between a configuration and Ray's placement groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.placement.hardware import KIND_PREFIX
from cluster.runtime import Accelerator
from configs.models import Constraints

Executor = Literal["mp", "ray"]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True, slots=True)
class RoleRequest:
    """All actors of one role: student ranks, or replicas of a teacher."""

    role: str  # of `actors_of`
    count: int
    accelerator: Accelerator
    shards: int = 1  # GPUs (or CPU slots) of one actor
    constraints: Constraints = field(default_factory=Constraints)
    may_span_nodes: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """One placement group."""

    name: str  # "student", "scorer-0", or "scorer" for all replicas together
    role: str  # of `actors_of`
    accelerator: Accelerator
    bundles: tuple[Mapping[str, float], ...]
    strategy: Strategy
    executor: Executor = "mp"
    member: Mapping[str, float] = field(default_factory=dict)  # what one actor takes
    bundle_of_actor: tuple[int, ...] = (0,)  # the bundle of each actor, in the order of ranks or replicas
    labels: Mapping[str, str] = field(default_factory=dict)  # that a node must have

    @property
    def gpu_kind(self) -> str | None:
        """The kind of GPU that the bundles name."""
        return next((key.removeprefix(KIND_PREFIX) for key in self.bundles[0] if key.startswith(KIND_PREFIX)), None)

    @property
    def num_gpus(self) -> int:
        return sum(int(bundle.get("GPU", 0)) for bundle in self.bundles)

    @property
    def num_slots(self) -> int:
        return sum(int(bundle["CPU"]) for bundle in self.bundles)


@dataclass(frozen=True, slots=True)
class Placement:
    """Every group of a run, the ones that are hardest to place first."""

    groups: tuple[Group, ...] = ()

    @property
    def num_slots(self) -> int:
        """Logical CPUs of Ray that the roles need."""
        return sum(group.num_slots for group in self.groups)

    @property
    def num_gpus(self) -> int:
        return sum(group.num_gpus for group in self.groups)

    def of_role(self, role: str) -> tuple[Group, ...]:
        """The groups of a role, by index."""
        return tuple(sorted((g for g in self.groups if g.role == role), key=lambda group: natural(group.name)))

    def actors_of_role(self, role: str) -> tuple[tuple[Group, int], ...]:
        """Group and bundle of every actor of a role, by rank or replica."""
        return tuple((group, bundle) for group in self.of_role(role) for bundle in group.bundle_of_actor)


def natural(name: str) -> tuple[str, int]:
    head, _, index = name.rpartition("-")
    return (head, int(index)) if index.isdigit() else (name, 0)
