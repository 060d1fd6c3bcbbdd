"""From roles and machines to placement groups, and from placed actors to ranks. Pure: no Ray here.

    student   one group, one bundle a rank
    teachers  one group a replica: a single bundle with its `tp` GPUs, so that it never spans nodes;
              with a strategy among the replicas one group for all of them, one bundle a replica;
              where it may span nodes and is larger than each, one-GPU bundles, and vLLM's `ray` executor
    nodes: n  one bundle a node, which the ranks or replicas of that node share, each node another

On hosts without GPUs a rank takes one logical CPU of Ray, a teacher one per shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.placement.capacity import eligible, fits
from cluster.placement.groups import Group, Placement, RoleRequest, Strategy
from cluster.placement.hardware import KIND_PREFIX, Hardware
from cluster.placement.messages import advice, all_asked, conditions, count_of, registered, shape, supply
from cluster.runtime import GPU, STUDENT, RankPlace
from trainer.errors import ConfigError

KIND_SHARE = 0.001
"""How much of the resource `accelerator_type:<name>` a bundle takes: enough to be bound to nodes that have it."""


def place(roles: Sequence[RoleRequest], hardware: Hardware) -> Placement:
    """Groups for all roles. Raises `ConfigError` with what is needed, registered and free where they can never fit."""
    for request in roles:
        _check_constraints(request, hardware)
    groups = [group for request in roles for group in _groups(request, hardware)]
    _check_totals(roles, groups, hardware)
    # The largest bundles first: Ray serves requests in order, and a late large one finds only fragments. Among equal
    # ones those that may not lie everywhere.
    groups.sort(key=lambda group: (-_size(group), not _is_choosy(group), group.role == STUDENT))
    if not fits(groups, hardware):
        raise _insufficient(groups, hardware)
    return Placement(tuple(_with_kinds(groups, hardware)))


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
        local_rank = 0 if gpus else sum(place.node == node for place in places)
        places.append(RankPlace(actor, rank, local_rank, sizes[node], node))
    return places


def _groups(request: RoleRequest, hardware: Hardware) -> list[Group]:
    constraints, count = request.constraints, request.count
    member = {"CPU": float(request.shards)} | ({"GPU": float(request.shards)} if request.accelerator == GPU else {})
    kind = {} if constraints.accelerator_type is None else {KIND_PREFIX + constraints.accelerator_type: KIND_SHARE}
    strategy: Strategy = constraints.strategy.upper()

    def group(name: str, shares: Sequence[int], strategy: Strategy) -> Group:
        """One bundle for each number of actors that share a node."""
        return Group(
            name,
            request.role,
            request.accelerator,
            bundles=tuple({key: value * share for key, value in member.items()} | kind for share in shares),
            strategy=strategy,
            member=member,
            bundle_of_actor=tuple(bundle for bundle, share in enumerate(shares) for _ in range(share)),
            labels=dict(constraints.node_labels),
        )

    if constraints.nodes is not None:
        each, rest = divmod(count, constraints.nodes)
        shares = [each + (node < rest) for node in range(constraints.nodes)]
        return [group(request.role, shares, "STRICT_SPREAD" if constraints.nodes > 1 else "STRICT_PACK")]
    if request.role == STUDENT:
        return [group(STUDENT, [1] * count, strategy)]
    if strategy != "PACK" and count > 1:
        return [group(request.role, [1] * count, strategy)]
    alone = [group(f"{request.role}-{index}", [1], "STRICT_PACK") for index in range(count)]
    if not _must_span(request, hardware):
        return alone
    single = {"CPU": 1.0, "GPU": 1.0}
    parts = (single | kind,) * request.shards
    return [replace(one, bundles=parts, strategy="PACK", executor="ray", member={"CPU": 1.0}) for one in alone]


def _must_span(request: RoleRequest, hardware: Hardware) -> bool:
    """Whether a replica is larger than every node it may lie on, and may be split."""
    if not request.may_span_nodes or request.accelerator != GPU:
        return False
    nodes = eligible(hardware, request.constraints.node_labels, request.constraints.accelerator_type)
    return request.shards > max((len(node.gpus) for node in nodes), default=0)


def _check_constraints(request: RoleRequest, hardware: Hardware) -> None:
    """Nodes that can never do, before anything is added up."""
    constraints = request.constraints
    found = eligible(hardware, constraints.node_labels, constraints.accelerator_type)
    wanted = constraints.nodes or (request.count if constraints.strategy == "strict_spread" else 1)
    if len(found) < wanted:
        raise ConfigError(
            f"{request.role} needs {count_of(wanted, 'node')}{conditions(constraints)}, and {len(found)} of "
            f"{len(hardware.nodes)} registered can be used: {registered(hardware)}. Change placement of the role, add "
            "nodes, or start them with `ray start --labels`"
        )
    if request.role != STUDENT and request.accelerator != GPU and request.may_span_nodes:
        raise ConfigError(f"{request.role}: may_span_nodes: true needs GPUs; on hosts a copy stays on one node")


def _check_totals(roles: Sequence[RoleRequest], groups: Sequence[Group], hardware: Hardware) -> None:
    needed = sum(group.num_gpus for group in groups)
    if needed > hardware.num_gpus:
        raise ConfigError(
            f"the run needs {count_of(needed, 'GPU')} ({all_asked(roles)}), {supply(hardware)}. Lower student.ranks, "
            "replicas or tensor_parallel_size, add nodes, or write accelerator: cpu"
        )
    slots = sum(group.num_slots for group in groups)
    known = [node.num_slots for node in hardware.nodes]
    if None not in known and slots > sum(known):
        raise ConfigError(
            f"the run needs {slots} CPU slots, one for each rank and teacher shard, and the Ray cluster has "
            f"{sum(known)}. Start its nodes with a higher --num-cpus, or lower student.ranks or replicas"
        )


def _with_kinds(groups: Sequence[Group], hardware: Hardware) -> list[Group]:
    """The groups, each bound to one kind of GPU where the machines are mixed and one kind can hold it.

    A student's ranks wait for the slowest of them in every step, so they come first and go on one kind; the teachers
    go on others where there is a choice, since Ray reserves them first.
    """
    chosen = list(groups)
    student_kind = None
    for index in sorted(range(len(groups)), key=lambda index: groups[index].role != STUDENT):
        kinds = hardware.gpu_kinds if len(hardware.gpu_kinds) > 1 and groups[index].gpu_kind is None else ()
        for kind in sorted(kinds, key=lambda kind: kind == student_kind):
            trial = [*chosen[:index], _on_kind(groups[index], kind), *chosen[index + 1 :]]
            if groups[index].num_gpus and fits(trial, hardware):
                chosen = trial
                break
        if groups[index].role == STUDENT:
            student_kind = chosen[index].gpu_kind
    return chosen


def _on_kind(group: Group, kind: str) -> Group:
    return replace(group, bundles=tuple({**bundle, KIND_PREFIX + kind: KIND_SHARE} for bundle in group.bundles))


def _insufficient(groups: Sequence[Group], hardware: Hardware) -> ConfigError:
    alone = [group for group in groups if not fits([group], hardware)]
    culprit = max(alone or groups, key=_size)
    beside = "" if alone else " beside the other roles"
    return ConfigError(
        f"{culprit.name} needs {shape(culprit)}, and that cannot be found{beside}: {registered(hardware)}; "
        f"{supply(hardware)}. {advice(culprit)}"
    )


def _size(group: Group) -> float:
    """Of the largest bundle: its GPUs, else its slots."""
    return max(bundle.get("GPU", 0) or bundle["CPU"] for bundle in group.bundles)


def _is_choosy(group: Group) -> bool:
    several = len(group.bundles) > 1
    return bool(group.labels) or group.gpu_kind is not None or (several and group.strategy.startswith("STRICT"))


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
