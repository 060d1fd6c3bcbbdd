"""Where roles may sit: strategies, labels, kinds of GPU, node counts, and what is refused at once."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import machines

from cluster.placement.groups import Group, RoleRequest
from cluster.placement.hardware import Hardware, Node
from cluster.placement.topology import place
from cluster.runtime import CPU, GENERATOR, GPU, SCORER, STUDENT
from configs.models import Constraints
from trainer.errors import ConfigError


def labelled(text: str, *labels: dict[str, str]) -> Hardware:
    nodes = machines(text).nodes
    return Hardware(tuple(dataclasses.replace(node, labels=own) for node, own in zip(nodes, labels, strict=True)))


def hosts(*slots: int) -> Hardware:
    """Nodes without GPUs, as a running cluster has them."""
    return Hardware(tuple(Node(f"node-{i}", num_cpus=8, num_slots=count) for i, count in enumerate(slots)))


def bundles_of(groups: tuple[Group, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(group.name, group.bundle_of_actor, group.strategy) for group in groups]


@pytest.mark.parametrize("strategy", ["pack", "spread", "strict_pack", "strict_spread"])
def test_the_strategy_of_the_student_is_that_of_its_group(strategy: str) -> None:
    request = RoleRequest(STUDENT, 4, CPU, constraints=Constraints(strategy=strategy))
    (group,) = place([request], hosts(4, 4, 4, 4)).groups
    assert (group.strategy, group.bundle_of_actor) == (strategy.upper(), (0, 1, 2, 3))
    assert [dict(bundle) for bundle in group.bundles] == [{"CPU": 1.0}] * 4


def test_replicas_share_a_group_only_where_they_have_a_strategy_among_each_other() -> None:
    alone = place([RoleRequest(SCORER, 2, GPU, 4)], machines("8xH100")).groups
    assert bundles_of(alone) == [("scorer-0", (0,), "STRICT_PACK"), ("scorer-1", (0,), "STRICT_PACK")]
    spread = RoleRequest(SCORER, 2, GPU, 4, constraints=Constraints(strategy="strict_spread"))
    placement = place([spread], machines("8xH100,8xH100"))
    assert bundles_of(placement.groups) == [("scorer", (0, 1), "STRICT_SPREAD")]
    assert [bundle["GPU"] for bundle in placement.groups[0].bundles] == [4, 4], "a replica is whole on its node"
    assert [bundle for _, bundle in placement.actors_of_role(SCORER)] == [0, 1]
    with pytest.raises(ConfigError, match=r"scorer needs 2 nodes, and 1 of 1 registered can be used: node-0: 8xH100"):
        place([spread], machines("8xH100"))


def test_exactly_so_many_nodes_means_a_bundle_for_each_of_them() -> None:
    request = RoleRequest(STUDENT, 5, GPU, constraints=Constraints(nodes=2))
    (group,) = place([request], machines("8xH100,8xH100,8xH100")).groups
    assert (group.strategy, group.bundle_of_actor) == ("STRICT_SPREAD", (0, 0, 0, 1, 1))
    assert [bundle["GPU"] for bundle in group.bundles] == [3, 2]
    assert group.member == {"CPU": 1.0, "GPU": 1.0}
    (one,) = place([RoleRequest(STUDENT, 5, GPU, constraints=Constraints(nodes=1))], machines("8xH100,8xH100")).groups
    assert (one.strategy, len(one.bundles), one.bundle_of_actor) == ("STRICT_PACK", 1, (0,) * 5)
    replicas = RoleRequest(SCORER, 4, GPU, 2, constraints=Constraints(nodes=2))
    (teachers,) = place([replicas], machines("8xH100,8xH100")).groups
    assert [bundle["GPU"] for bundle in teachers.bundles] == [4, 4]
    assert (teachers.member["GPU"], teachers.bundle_of_actor) == (2, (0, 0, 1, 1))


def test_labels_and_kinds_reach_the_group_and_must_exist() -> None:
    hardware = labelled("8xH100,8xH100,8xA100", {"pool": "a"}, {"pool": "b"}, {"pool": "b"})
    student = RoleRequest(STUDENT, 4, GPU, constraints=Constraints(node_labels={"pool": "b"}, accelerator_type="A100"))
    (group,) = place([student], hardware).groups
    assert group.labels == {"pool": "b"}
    assert all(bundle["accelerator_type:A100"] == 0.001 for bundle in group.bundles)
    for wrong in (Constraints(node_labels={"pool": "c"}), Constraints(accelerator_type="B200")):
        with pytest.raises(ConfigError, match=r"student needs 1 node with .*, and 0 of 3 registered .*labels pool=a"):
            place([RoleRequest(STUDENT, 4, GPU, constraints=wrong)], hardware)
    with pytest.raises(ConfigError, match=r"student needs 12 GPUs with labels pool=a"):
        place([RoleRequest(STUDENT, 12, GPU, constraints=Constraints(node_labels={"pool": "a"}))], hardware)


def test_whoever_may_not_sit_everywhere_is_reserved_first() -> None:
    hardware = Hardware(
        (Node("a", 8, num_slots=1, labels={"role": "student"}), Node("b", 8, num_slots=1, labels={"role": "teacher"}))
    )
    roles = [
        RoleRequest(STUDENT, 1, CPU, constraints=Constraints(node_labels={"role": "student"})),
        RoleRequest(SCORER, 1, CPU),
    ]
    assert [group.name for group in place(roles, hardware).groups] == ["student", "scorer-0"]
    assert [group.name for group in place(roles[::-1], hardware).groups] == ["student", "scorer-0"]


def test_a_split_that_no_node_can_hold_is_refused_on_hosts_too() -> None:
    with pytest.raises(
        ConfigError, match=r"scorer-0 needs 4 CPU slots on one node.*cannot be found: node-0: no GPU, 3"
    ):
        place([RoleRequest(SCORER, 1, CPU, 4)], hosts(3, 3))
    place([RoleRequest(SCORER, 1, CPU, 3)], hosts(3, 3))
    with pytest.raises(ConfigError, match="may_span_nodes: true needs GPUs"):
        place([RoleRequest(SCORER, 1, CPU, 4, may_span_nodes=True)], hosts(3, 3))
    with pytest.raises(ConfigError, match=r"student needs 4 CPU slots on one node"):
        place([RoleRequest(STUDENT, 4, CPU, constraints=Constraints(strategy="strict_pack"))], hosts(3, 3))
    with pytest.raises(ConfigError, match=r"student needs 2 nodes with 2 CPU slots each, .*4 CPU slots registered"):
        place([RoleRequest(STUDENT, 4, CPU, constraints=Constraints(nodes=2))], hosts(3, 1))


def test_what_fits_alone_and_not_together_says_so() -> None:
    roles = [
        RoleRequest(STUDENT, 2, CPU, constraints=Constraints(strategy="strict_pack")),
        RoleRequest(SCORER, 1, CPU, 2),
    ]
    with pytest.raises(ConfigError, match="beside the other roles"):
        place(roles, hosts(3, 1))
    assert len(place(roles, hosts(2, 2)).groups) == 2


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.lists(
        st.tuples(
            st.integers(1, 3), st.integers(1, 2), st.sampled_from(["pack", "spread", "strict_pack", "strict_spread"])
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_only_what_cannot_be_is_refused(slots: list[int], roles: list[tuple[int, int, str]]) -> None:
    """Against brute force over every assignment of bundles to nodes; what is impossible is seen where sizes divide."""
    requests = [RoleRequest(SCORER, n, CPU, size, constraints=Constraints(strategy=how)) for n, size, how in roles]
    bundles = [(i, size, how) for i, (count, size, how) in enumerate(roles) for _ in range(count)]

    def holds(where: tuple[int, ...]) -> bool:
        for node, room in enumerate(slots):
            if sum(size for (_, size, _), at in zip(bundles, where, strict=True) if at == node) > room:
                return False
        for i, (count, _, how) in enumerate(roles):
            used = {at for (group, _, _), at in zip(bundles, where, strict=True) if group == i}
            if (how == "strict_pack" and len(used) != 1) or (how == "strict_spread" and len(used) != count):
                return False
        return True

    possible = any(holds(where) for where in itertools.product(range(len(slots)), repeat=len(bundles)))
    sizes = sorted({count * size if how == "strict_pack" else size for count, size, how in roles})
    exact = all(large % small == 0 for small, large in itertools.pairwise(sizes))
    exact = exact and not any(how == "strict_spread" for _, _, how in roles)
    if possible:
        place(requests, hosts(*slots))
    elif exact:
        with pytest.raises(ConfigError):
            place(requests, hosts(*slots))


def test_sizes_that_do_not_divide_are_refused_where_sums_tell_and_left_to_ray_otherwise() -> None:
    def replicas(*shards: int) -> list[RoleRequest]:
        return [RoleRequest(SCORER, 1, GPU, size) for size in shards]

    with pytest.raises(ConfigError, match="beside the other roles"):
        place(replicas(4, 3, 3, 3, 3), machines("8xH100,8xH100"))
    assert place(replicas(5, 3, 3, 3), machines("7xH100,7xH100")).num_gpus == 14, "cannot be, which no sum says"


def test_roles_that_share_labelled_nodes_must_fit_on_those_together() -> None:
    hardware = labelled("8xH100,8xH100", {"pool": "a"}, {"pool": "b"})
    pool = Constraints(node_labels={"pool": "a"})
    roles = [RoleRequest(STUDENT, 4, GPU, constraints=pool), RoleRequest(SCORER, 1, GPU, 4, constraints=pool)]
    assert place(roles, hardware).num_gpus == 8
    with pytest.raises(ConfigError, match="beside the other roles"):
        place([*roles, RoleRequest(GENERATOR, 1, GPU, 1, constraints=pool)], hardware)


def test_teachers_stay_off_the_kind_of_gpu_that_the_student_asks_for() -> None:
    """Ray reserves the teachers first, and would give them what only the student needs."""
    student = RoleRequest(STUDENT, 8, GPU, constraints=Constraints(accelerator_type="A100"))
    groups = {g.name: g for g in place([student, RoleRequest(SCORER, 2, GPU, 4)], machines("8xA100,8xH100")).groups}
    assert all("accelerator_type:H100" in groups[name].bundles[0] for name in ("scorer-0", "scorer-1"))


def test_two_hundred_and_fifty_six_ranks_are_placed_at_once() -> None:
    hardware = machines(",".join(["8xH100"] * 64))
    roles = [
        RoleRequest(STUDENT, 256, GPU, constraints=Constraints(nodes=32)),
        RoleRequest(SCORER, 32, GPU, 8),
    ]
    assert place(roles, hardware).num_gpus == 512
