"""From a pure placement to Ray's placement groups: all requested together, all there before anything starts, all given
back when one is missing at the deadline.

When a node of a group dies, Ray looks for another place for the bundles that lay there; a role waits for that in
`wait_until_placed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.lifecycle.nodes import alive_nodes
from cluster.placement.groups import Group, Placement
from cluster.runtime import GPU
from trainer.errors import InsufficientResources

POLL_S = 0.1
SAY_AFTER_S = 10.0
OVERTAKEN_AFTER_S = 5.0  # a cluster that has room gives it at once


@dataclass(frozen=True, slots=True)
class PlacedGroup:
    """A group and the reservation that Ray made for it."""

    group: Group
    handle: PlacementGroup


@dataclass(frozen=True, slots=True)
class PlacedGroups:
    """All reservations of a run."""

    groups: tuple[PlacedGroup, ...]

    def of_role(self, role: str) -> tuple[PlacedGroup, ...]:
        """The groups of a role, by index."""
        by_name = {placed.group.name: placed for placed in self.groups}
        return tuple(by_name[group.name] for group in Placement(tuple(p.group for p in self.groups)).of_role(role))

    def actors_of_role(self, role: str) -> tuple[tuple[PlacedGroup, int], ...]:
        """Group and bundle of every actor of a role, by rank or replica."""
        return tuple((placed, bundle) for placed in self.of_role(role) for bundle in placed.group.bundle_of_actor)

    def nodes(self) -> dict[str, tuple[str, ...]]:
        """Node id -> what sits there: names of groups."""
        found: dict[str, list[str]] = {}
        for placed in self.groups:
            for node in nodes_of(placed):
                found.setdefault(node, []).append(placed.group.name)
        return {node: tuple(names) for node, names in found.items()}

    def release(self) -> None:
        """Give everything back; actors that still run in the groups die."""
        for placed in self.groups:
            remove_placement_group(placed.handle)


async def create_groups(
    placement: Placement, *, timeout_s: float, run_id: str = "", note: Callable[[str], None] = lambda text: None
) -> PlacedGroups:
    """Reserve what the run needs. At the deadline raises `InsufficientResources`: what is needed, registered and free.

    All groups are asked for at once, so that an autoscaler sees the whole need. Ray serves whichever fits first: where
    others hold a part of the cluster, groups of small bundles may lie down on the pieces that together a large one
    needs, and keep it out for good. Those are given back then, and asked for again behind it.

    `run_id` begins the name of every group. `note` is told once where this takes longer than a moment.
    """
    placed: dict[str, PlacedGroup] = {}  # by name, the hardest to place first
    started = time.monotonic()

    async def wait_until_reserved() -> None:
        await _all_reserved(placed.values(), _needed(placement), started=started, timeout_s=timeout_s, note=note)

    with contextlib.ExitStack() as undo:
        undo.callback(lambda: [remove_placement_group(one.handle) for one in placed.values()])
        for group in placement.groups:
            placed[group.name] = _request(group, run_id)
        for group in await _give_back_overtaken(placed, within_s=min(OVERTAKEN_AFTER_S, timeout_s)):
            await wait_until_reserved()
            placed[group.name] = _request(group, run_id)
        await wait_until_reserved()
        undo.pop_all()
    return PlacedGroups(tuple(placed[group.name] for group in placement.groups))


async def wait_until_placed(placed: PlacedGroup, *, timeout_s: float, note: Callable[[str], None]) -> None:
    """Until every bundle of a group lies on a node that is alive: at once, unless a node died.

    Raises `InsufficientResources` at the deadline.
    """
    bundles = placed.group.bundles
    needed = {key: sum(bundle.get(key, 0) for bundle in bundles) for key in ("CPU", GPU.upper())}
    await _all_reserved([placed], needed, started=time.monotonic(), timeout_s=timeout_s, note=note)


def _request(group: Group, run_id: str) -> PlacedGroup:
    handle = placement_group(
        [dict(bundle) for bundle in group.bundles],
        strategy=group.strategy,
        name=f"{run_id}/{group.name}" if run_id else "",
        bundle_label_selector=[dict(group.labels)] * len(group.bundles) if group.labels else None,
    )
    return PlacedGroup(group, handle)


async def _give_back_overtaken(placed: dict[str, PlacedGroup], *, within_s: float) -> list[Group]:
    """Take out of `placed` what is there although a group before it is missing when the time is over."""
    until = time.monotonic() + within_s
    while missing := [name for name in placed if not await asyncio.to_thread(_is_reserved, placed[name])]:
        if time.monotonic() > until:
            later = list(placed)[list(placed).index(missing[0]) + 1 :]
            overtaken = [placed.pop(name) for name in later if name not in missing]
            for one in overtaken:
                remove_placement_group(one.handle)
            return [one.group for one in overtaken]
        await asyncio.sleep(POLL_S)
    return []


async def _all_reserved(
    groups: Iterable[PlacedGroup],
    needed: Mapping[str, float],
    *,
    started: float,
    timeout_s: float,
    note: Callable[[str], None],
) -> None:
    said = False
    while missing := [one for one in groups if not await asyncio.to_thread(_is_reserved, one)]:
        waited = time.monotonic() - started
        names = ", ".join(one.group.name for one in missing)
        amounts = (
            f"The run needs {_amounts(needed)}; the Ray cluster has {_amounts(ray.cluster_resources())}, of which "
            f"{_amounts(ray.available_resources())} are free beside the run's other groups"
        )
        if waited > timeout_s:
            raise InsufficientResources(
                f"insufficient resources for {names} after {timeout_s:.0f} s. {amounts}. Somebody else may use "
                "the rest: see `ray status`"
            )
        if waited > SAY_AFTER_S and not said:
            note(f"waiting for resources for {names}. {amounts}")
            said = True
        await asyncio.sleep(POLL_S)


def actor_options(
    placed: PlacedGroup, *, environment: Mapping[str, str], bundle: int = 0, name: str | None = None
) -> dict[str, Any]:
    """For `ActorClass.options(**...)`: where an actor of a group runs, what it may use, and what it starts with.

    `name` must be new on the cluster. Actors are never restarted by Ray, nor their calls repeated:
    `cluster/lifecycle/health.py` decides both.
    """
    group = placed.group
    # The ray executor starts its own workers in the group: the engine's process leaves the GPUs to them.
    outside = group.executor == "ray"
    return {
        "num_cpus": group.member["CPU"],
        "num_gpus": group.member.get(GPU.upper(), 0),
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": dict(environment)},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placed.handle, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=outside
        ),
    } | ({} if name is None else {"name": name})


def _is_reserved(placed: PlacedGroup) -> bool:
    # PlacementGroup.wait counts whole seconds and ready() starts a task: the table is exact and free.
    if placement_group_table(placed.handle)["state"] != "CREATED":
        return False
    return set(nodes_of(placed)) <= alive_nodes().keys()  # the table learns of a dead node a moment later


def nodes_of(placed: PlacedGroup) -> list[str]:
    """Ids of the nodes on which a group lies."""
    return list(dict.fromkeys(placement_group_table(placed.handle)["bundles_to_node_id"].values()))


def _needed(placement: Placement) -> dict[str, float]:
    return {"CPU": placement.num_slots, "GPU": placement.num_gpus}


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('GPU', 0):g} GPUs and {resources.get('CPU', 0):g} CPU slots"
