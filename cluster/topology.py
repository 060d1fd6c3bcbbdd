"""Who sits where: from roles and machines to placement groups, and from placed actors to ranks. Pure: no Ray here.

    student   one group, one bundle a rank
    teachers  one group a replica: a single bundle with its `tp` GPUs, so that it never spans nodes;
              only a replica larger than every node gets one-GPU bundles, and vLLM's `ray` executor

On hosts without GPUs a role is a logical slot: one CPU of Ray's books for a rank, one per shard for a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.hardware import Hardware, Node
from cluster.runtime import GPU, STUDENT, Accelerator, Role
from trainer.errors import ConfigError

Executor = Literal["mp", "ray"]

KIND_SHARE = 0.001
"""How much of the resource `accelerator_type:<name>` a bundle takes: enough to be bound to nodes that have it."""


@dataclass(frozen=True, slots=True)
class RoleRequest:
    """All actors of one role: student ranks, or replicas of a teacher."""

    role: Role
    count: int
    accelerator: Accelerator
    shards: int = 1  # GPUs (or CPU slots) of one actor


@dataclass(frozen=True, slots=True)
class Group:
    """One placement group."""

    name: str  # "student", "scorer-0"
    role: Role
    accelerator: Accelerator
    bundles: tuple[Mapping[str, float], ...]
    strategy: Literal["PACK", "STRICT_PACK"]
    executor: Executor = "mp"

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
        """CPUs of Ray's books that the roles need."""
        return sum(group.num_slots for group in self.groups)

    @property
    def num_gpus(self) -> int:
        return sum(group.num_gpus for group in self.groups)

    def of_role(self, role: Role) -> tuple[Group, ...]:
        """The groups of a role, by index."""
        return tuple(sorted((g for g in self.groups if g.role == role), key=lambda group: _natural(group.name)))


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank an actor is."""

    actor: int  # index of the actor, as it was started
    rank: int
    local_rank: int  # what LOCAL_RANK must say: among the GPUs the process *sees*, so 0 where Ray masked it to one
    local_size: int  # ranks on this node
    node: str
    local_index: int  # among the ranks of this node


def place(roles: Sequence[RoleRequest], hardware: Hardware) -> Placement:
    """Groups for all roles. Raises `ConfigError` with what is needed, registered and free where they can never fit."""
    largest_node = max((len(node.gpus) for node in hardware.nodes), default=0)
    groups = [group for request in roles for group in _groups(request, largest_node)]
    _check_totals(roles, groups, hardware)
    # The largest bundles first: Ray serves requests in order, and a late large one finds only fragments.
    groups.sort(key=lambda group: (-max(bundle.get("GPU", 0) for bundle in group.bundles), group.role == STUDENT))
    return Placement(tuple(_fit(groups, hardware)))


def number_ranks(placed: Sequence[tuple[int, str, Sequence[str]]]) -> list[RankPlace]:
    """Ranks by (node, GPU) from (actor index, node id, GPU ids that Ray handed out), in rank order.

    Actor 0's node comes first, so that a group on one node and a group on many are numbered alike. Raises
    `ConfigError` where two actors hold one GPU of a node, or an actor does not hold exactly one.
    """
    by_actor = sorted(placed, key=lambda item: item[0])
    node_order = list(dict.fromkeys(node for _, node, _ in by_actor))
    _check_gpus(by_actor)
    ordered = sorted(by_actor, key=lambda item: (node_order.index(item[1]), _gpu_key(item[2]), item[0]))
    sizes = {node: sum(other == node for _, other, _ in by_actor) for node in node_order}
    places: list[RankPlace] = []
    for rank, (actor, node, gpus) in enumerate(ordered):
        local_index = sum(place.node == node for place in places)
        local_rank = 0 if gpus else local_index
        places.append(RankPlace(actor, rank, local_rank, sizes[node], node, local_index))
    return places


def _groups(request: RoleRequest, largest_node: int) -> list[Group]:
    bundle = {"CPU": 1.0}
    if request.accelerator == GPU:
        bundle["GPU"] = 1.0
    if request.role == STUDENT:
        return [Group(STUDENT, STUDENT, request.accelerator, (bundle,) * request.count, "PACK")]
    names = [f"{request.role}-{index}" for index in range(request.count)]
    if request.accelerator == GPU and request.shards > largest_node > 0:
        bundles = (bundle,) * request.shards
        return [Group(name, request.role, request.accelerator, bundles, "PACK", "ray") for name in names]
    whole = dict.fromkeys(bundle, float(request.shards))
    return [Group(name, request.role, request.accelerator, (whole,), "STRICT_PACK") for name in names]


def _check_totals(roles: Sequence[RoleRequest], groups: Sequence[Group], hardware: Hardware) -> None:
    needed = sum(group.num_gpus for group in groups)
    if needed > hardware.num_gpus:
        raise ConfigError(
            f"the run needs {_count(needed, 'GPU')} ({_ask(roles)}), {_supply(hardware)}. Lower student.ranks, "
            "replicas or tensor_parallel_size, add nodes, or write accelerator: cpu"
        )
    slots = sum(group.num_slots for group in groups)
    known = [node.num_slots for node in hardware.nodes]
    if None not in known and slots > sum(known):
        raise ConfigError(
            f"the run needs {slots} CPU slots, one for each rank and teacher shard, and the Ray cluster has "
            f"{sum(known)}. Start its nodes with a higher --num-cpus, or lower student.ranks or replicas"
        )


def _fit(groups: Sequence[Group], hardware: Hardware) -> list[Group]:
    """The groups, bound to one kind of GPU each where the machines are mixed.

    A student's ranks wait for the slowest of them in every step, so they go on one kind if any kind can hold them all.
    """
    kinds = hardware.gpu_kinds
    student = next((group for group in groups if group.role == STUDENT and group.num_gpus), None)
    if not any(group.num_gpus for group in groups) or (len(kinds) == 1 and _pack(groups, hardware, None) is not None):
        return list(groups)
    for kind in [*kinds, None] if student and len(kinds) > 1 else [None]:
        found = _pack(groups, hardware, kind)
        if found is not None:
            return [_bound(group, found[group.name]) for group in groups] if len(kinds) > 1 else list(groups)
    largest = max(groups, key=lambda group: max(bundle.get("GPU", 0) for bundle in group.bundles))
    size = int(max(bundle.get("GPU", 0) for bundle in largest.bundles))
    raise ConfigError(
        f"{largest.name} needs {_count(size, 'GPU')} on one node, and beside the other roles no node has them: "
        f"{_supply(hardware)}. Choose sizes that divide the nodes, or add a node"
    )


def _pack(groups: Sequence[Group], hardware: Hardware, student_kind: str | None) -> dict[str, str | None] | None:
    """Best fit, in the order of the groups: the kind of GPU each got (None: several), or None."""
    free = {node.name: len(node.gpus) for node in hardware.nodes}
    kinds: dict[str, str | None] = {}
    # The ranks take single GPUs, so they never block each other; placing them last leaves whole nodes to teachers.
    for group in sorted(groups, key=lambda group: group.role == STUDENT):
        wanted = student_kind if group.role == STUDENT else None
        used: set[str] = set()
        for bundle in group.bundles:
            size = int(bundle.get("GPU", 0))
            if not size:
                continue
            node = _best(hardware.nodes, free, size, wanted, avoid=student_kind if group.role != STUDENT else None)
            if node is None:
                return None
            free[node.name] -= size
            used.add(node.gpus[0])
        kinds[group.name] = used.pop() if len(used) == 1 else None
    return kinds


def _best(
    nodes: Sequence[Node], free: Mapping[str, int], size: int, kind: str | None, avoid: str | None
) -> Node | None:
    """The node that keeps the fewest GPUs after giving `size`; one of another kind than `avoid` if there is any."""
    fitting = [node for node in nodes if free[node.name] >= size and (kind is None or node.gpus[0] == kind)]
    return min(fitting, key=lambda node: (node.gpus[0] == avoid, free[node.name]), default=None)


def _bound(group: Group, kind: str | None) -> Group:
    if kind is None or not group.num_gpus:
        return group
    bundles = tuple({**bundle, f"accelerator_type:{kind}": KIND_SHARE} for bundle in group.bundles)
    return Group(group.name, group.role, group.accelerator, bundles, group.strategy, group.executor)


def _check_gpus(placed: Sequence[tuple[int, str, Sequence[str]]]) -> None:
    holders: dict[tuple[str, str], int] = {}
    counts = {len(gpus) for _, _, gpus in placed}
    if not counts <= {0} and not counts <= {1}:
        raise ConfigError(f"student ranks must hold one GPU each, or none; they hold {[list(g) for _, _, g in placed]}")
    for actor, node, gpus in placed:
        for gpu in gpus:
            if (node, gpu) in holders:
                raise ConfigError(
                    f"GPU {gpu} of node {node} was given to student ranks {holders[node, gpu]} and {actor}"
                )
            holders[node, gpu] = actor


def _gpu_key(gpus: Sequence[str]) -> tuple[int, str]:
    return (int(gpus[0]), "") if gpus and gpus[0].isdigit() else (0, gpus[0] if gpus else "")


def _natural(name: str) -> tuple[str, int]:
    head, _, index = name.rpartition("-")
    return (head, int(index)) if index.isdigit() else (name, 0)


def _ask(roles: Sequence[RoleRequest]) -> str:
    texts = []
    for request in roles:
        if request.accelerator == GPU:
            each = f" of {request.shards}" if request.shards > 1 else ""
            noun = "rank" if request.role == STUDENT else "replica"
            texts.append(f"{request.role}: {_count(request.count, noun)}{each}")
    return ", ".join(texts)


def _supply(hardware: Hardware) -> str:
    free = sum(node.free_gpus for node in hardware.nodes)
    per_node = ", ".join(str(len(node.gpus)) for node in hardware.nodes)
    where = f" (per node: {per_node})" if len(hardware.nodes) > 1 else ""
    return f"{_count(hardware.num_gpus, 'GPU')} registered{where}, {free} free"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
