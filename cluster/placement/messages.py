"""What a placement needs and what machines offer, in words: for the one message of a run that cannot be placed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.placement.groups import Group, RoleRequest
from cluster.placement.hardware import Hardware
from cluster.runtime import GPU, STUDENT
from configs.models import Constraints

MAX_NAMED = 8  # nodes in a message


def all_asked(roles: Sequence[RoleRequest]) -> str:
    """The GPUs of every role."""
    texts = []
    for request in roles:
        if request.accelerator == GPU:
            each = f" of {request.shards}" if request.shards > 1 else ""
            noun = "rank" if request.role == STUDENT else "replica"
            texts.append(f"{request.role}: {count_of(request.count, noun)}{each}")
    return ", ".join(texts)


def shape(group: Group) -> str:
    """What a group needs, in words: `2 nodes with 4 GPUs each, labels pool=a`."""
    unit = "GPU" if group.num_gpus else "CPU slot"
    sizes = [int(bundle.get("GPU", 0) or bundle["CPU"]) for bundle in group.bundles]
    if group.strategy == "STRICT_SPREAD" and len(sizes) > 1:
        text = f"{len(sizes)} nodes with {count_of(max(sizes), unit)} each"
    elif group.strategy == "STRICT_PACK":
        text = f"{count_of(sum(sizes), unit)} on one node"
    else:
        each = f", {max(sizes)} of them together" if max(sizes) > 1 else ""
        text = f"{count_of(sum(sizes), unit)}{each}"
    return text + conditions(Constraints(accelerator_type=group.gpu_kind, node_labels=dict(group.labels)))


def conditions(constraints: Constraints) -> str:
    """The conditions on a node, in words."""
    conditions = [] if constraints.accelerator_type is None else [f"accelerator_type {constraints.accelerator_type}"]
    if constraints.node_labels:
        conditions.append("labels " + label_text(constraints.node_labels))
    return f" with {' and '.join(conditions)}" if conditions else ""


def advice(group: Group) -> str:
    """What to change where a group cannot be placed."""
    if group.role == STUDENT:
        return "Lower student.ranks, change student.placement, or add nodes"
    text = "Choose sizes that divide the nodes, or add a node"
    larger = group.accelerator == GPU and len(group.bundles) == 1 and group.executor == "mp"
    return text + ("; may_span_nodes: true splits a copy that is larger than every node" if larger else "")


def registered(hardware: Hardware) -> str:
    """Every node in a few words; of many, the first."""
    texts = []
    for node in hardware.nodes[:MAX_NAMED]:
        kinds = ", ".join(f"{node.gpus.count(kind)}x{kind}" for kind in dict.fromkeys(node.gpus))
        slots = "" if node.num_slots is None else f"{node.num_slots} CPU slots"
        labels = {key: value for key, value in node.labels.items() if not key.startswith("ray.io/")}
        facts = [kinds or "no GPU", slots, f"labels {label_text(labels)}" if labels else ""]
        texts.append(f"{node.host or node.name}: {', '.join(fact for fact in facts if fact)}")
    more = len(hardware.nodes) - MAX_NAMED
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")


def label_text(labels: Mapping[str, str]) -> str:
    """`pool=a, zone=b`."""
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))


def supply(hardware: Hardware) -> str:
    """What is registered and free."""
    per_node = ", ".join(str(len(node.gpus)) for node in hardware.nodes)
    where = f" (per node: {per_node})" if len(hardware.nodes) > 1 else ""
    free = sum(node.free_gpus for node in hardware.nodes)
    text = f"{count_of(hardware.num_gpus, 'GPU')} registered{where}, {free} free"
    known = [node.num_slots for node in hardware.nodes]
    if None in known:
        return text
    return f"{text}; {count_of(sum(known), 'CPU slot')} registered, {sum(n.free_slots for n in hardware.nodes)} free"


def count_of(number: int, noun: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
