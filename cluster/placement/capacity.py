"""Can these groups be placed on these machines? Sums over the nodes; what they leave open, Ray decides. Pure.

A node with c GPUs has c // s parts of s GPUs, and a bundle of t GPUs uses up t // s of them. So for every size s in use
the sum of t // s over all bundles must not exceed the sum of c // s over the nodes. Where each size divides the next
(1, 2, 4, 8), bundles that meet this can be placed. Otherwise, and beside groups with a node for each bundle, a few that
cannot pass as well, and end with Ray's timeout.
The CPUs that Ray hands out are compared alike, and each set of nodes that groups are restricted to by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.placement.groups import Group
from cluster.placement.hardware import Hardware, Node

UNLIMITED = 10**9  # CPUs of a cluster that is started with as many as the roles need


@dataclass(frozen=True, slots=True)
class _Part:
    """What must lie on one node."""

    gpus: int
    slots: int
    nodes: frozenset[str]  # names of those it may lie on


def eligible(hardware: Hardware, labels: Mapping[str, str], kind: str | None) -> list[Node]:
    """The nodes that have the labels and the kind of GPU."""
    return [
        node
        for node in hardware.nodes
        if labels.items() <= node.labels.items() and kind in (None, *node.gpus, *node.accelerator_types)
    ]


def fits(groups: Sequence[Group], hardware: Hardware) -> bool:
    """False where the groups cannot be placed together, True where they can or where sums do not tell."""
    parts = [part for group in groups for part in _parts(group, hardware)]
    if not all(_spreads(group, hardware) for group in groups if group.strategy == "STRICT_SPREAD"):
        return False
    everywhere = frozenset(node.name for node in hardware.nodes)
    for places in {everywhere, *(part.nodes for part in parts)}:
        inside = [part for part in parts if part.nodes <= places]
        nodes = [node for node in hardware.nodes if node.name in places]
        on_gpus = [part.gpus for part in inside if part.gpus]
        if not _sums_fit(on_gpus, [_gpus(node) for node in nodes]):
            return False
        if not _sums_fit([part.slots for part in inside], [_slots(node) for node in nodes]):
            return False
    return True


def _sums_fit(sizes: Collection[int], capacities: Collection[int]) -> bool:
    return all(sum(t // s for t in sizes) <= sum(c // s for c in capacities) for s in {1, *sizes})


def _parts(group: Group, hardware: Hardware) -> list[_Part]:
    nodes = frozenset(node.name for node in eligible(hardware, group.labels, group.gpu_kind))
    if group.strategy == "STRICT_PACK":
        return [_Part(group.num_gpus, group.num_slots, nodes)]
    return [_Part(int(bundle.get("GPU", 0)), int(bundle["CPU"]), nodes) for bundle in group.bundles]


def _spreads(group: Group, hardware: Hardware) -> bool:
    """Whether there is a node for each bundle."""
    nodes = eligible(hardware, group.labels, group.gpu_kind)
    free = sorted((_gpus(node) if group.num_gpus else _slots(node) for node in nodes), reverse=True)
    sizes = sorted((bundle["CPU"] for bundle in group.bundles), reverse=True)  # a GPU comes with a CPU
    return len(sizes) <= len(free) and all(size <= has for size, has in zip(sizes, free, strict=False))


def _gpus(node: Node) -> int:
    """Those that have a CPU each."""
    return min(len(node.gpus), _slots(node))


def _slots(node: Node) -> int:
    return UNLIMITED if node.num_slots is None else node.num_slots
