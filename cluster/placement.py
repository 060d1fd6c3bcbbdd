"""From a pure placement to Ray's placement groups: all requested together, all there before anything starts, all given
back when one is missing at the deadline."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.runtime import GPU, Role
from cluster.topology import Group, Placement
from trainer.errors import InfrastructureError

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class PlacedGroup:
    """A group and the reservation that Ray made for it."""

    group: Group
    handle: PlacementGroup


@dataclass(frozen=True, slots=True)
class PlacedGroups:
    """All reservations of a run."""

    groups: tuple[PlacedGroup, ...]

    def of_role(self, role: Role) -> tuple[PlacedGroup, ...]:
        """The groups of a role, by index: one for the students, one a replica for a teacher."""
        by_name = {placed.group.name: placed for placed in self.groups}
        return tuple(by_name[group.name] for group in Placement(tuple(p.group for p in self.groups)).of_role(role))

    def release(self) -> None:
        """Give everything back; actors that still run in the groups die."""
        for placed in self.groups:
            remove_placement_group(placed.handle)


def create_groups(placement: Placement, *, timeout_s: float) -> PlacedGroups:
    """Reserve what the run needs. At the deadline raises `InfrastructureError`: what is needed, registered and free."""
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as undo:
        groups = []
        for group in placement.groups:
            handle = placement_group([dict(bundle) for bundle in group.bundles], strategy=group.strategy)
            undo.callback(remove_placement_group, handle)
            groups.append(PlacedGroup(group, handle))
        while missing := [one for one in groups if not _is_reserved(one)]:
            if time.monotonic() < deadline:
                time.sleep(POLL_S)
                continue
            names = ", ".join(one.group.name for one in missing)
            raise InfrastructureError(
                f"no room for {names} after {timeout_s:.0f} s. The run needs {_amounts(_needed(placement))}; the Ray "
                f"cluster has {_amounts(ray.cluster_resources())}, of which {_amounts(ray.available_resources())} are "
                "free beside the run's other groups. Somebody else may use the rest: see `ray status`"
            )
        undo.pop_all()
    return PlacedGroups(tuple(groups))


def actor_options(placed: PlacedGroup, *, environment: Mapping[str, str], bundle: int = 0) -> dict[str, Any]:
    """For `ActorClass.options(**...)`: where an actor of a group runs, what it may use, and what it starts with.

    `bundle` is the index of the rank; a replica has one bundle. Actors are never restarted by Ray, nor their calls
    repeated: `cluster/health.py` decides both.
    """
    group = placed.group
    resources = group.bundles[bundle]
    # The ray executor starts its own workers in the group: the engine's process leaves the GPUs to them.
    outside = group.executor == "ray"
    return {
        "num_cpus": resources["CPU"],
        "num_gpus": 0 if outside else resources.get(GPU.upper(), 0),
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": dict(environment)},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placed.handle, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=outside
        ),
    }


def _is_reserved(placed: PlacedGroup) -> bool:
    # PlacementGroup.wait counts whole seconds and ready() starts a task: the table is exact and free.
    return placement_group_table(placed.handle)["state"] == "CREATED"


def _needed(placement: Placement) -> dict[str, float]:
    return {"CPU": placement.num_slots, "GPU": placement.num_gpus}


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('GPU', 0):g} GPUs and {resources.get('CPU', 0):g} CPU slots"
