"""Placement and rank numbers as tables, with an independent packing check."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import machines

from cluster.placement.groups import RoleRequest
from cluster.placement.hardware import Hardware, Node, gpu_has_bfloat16
from cluster.placement.topology import number_ranks, place
from cluster.runtime import CPU, GENERATOR, GPU, SCORER, STUDENT, RankPlace
from trainer.errors import ConfigError


def sizes(placement: object) -> dict[str, list[float]]:
    return {group.name: [bundle.get("GPU", 0) for bundle in group.bundles] for group in placement.groups}


def test_a_replica_is_one_bundle_and_a_rank_is_one_bundle() -> None:
    roles = [RoleRequest(STUDENT, 4, GPU), RoleRequest(SCORER, 2, GPU, 2)]
    placement = place(roles, machines("8xH100"))
    assert sizes(placement) == {"scorer-0": [2], "scorer-1": [2], "student": [1, 1, 1, 1]}
    strategies = {group.name: (group.strategy, group.executor) for group in placement.groups}
    assert strategies["scorer-0"] == ("STRICT_PACK", "mp")
    assert strategies["student"] == ("PACK", "mp")
    assert (placement.num_gpus, placement.num_slots) == (8, 8)


def test_large_replicas_are_requested_before_small_ones_and_ranks_last() -> None:
    roles = [RoleRequest(STUDENT, 4, GPU), RoleRequest(SCORER, 1, GPU, 8), RoleRequest(GENERATOR, 2, GPU, 2)]
    names = [group.name for group in place(roles, machines("8xH100,8xH100")).groups]
    assert names == ["scorer-0", "generator-0", "generator-1", "student"]


def test_only_a_replica_larger_than_every_node_spans_nodes_and_only_if_it_may() -> None:
    with pytest.raises(ConfigError, match=r"16 GPUs on one node.*8xH100.*may_span_nodes: true"):
        place([RoleRequest(SCORER, 1, GPU, 16)], machines("8xH100,8xH100"))
    roles = [RoleRequest(SCORER, 1, GPU, 16, may_span_nodes=True)]
    (group,) = place(roles, machines("8xH100,8xH100")).groups
    assert (group.executor, group.strategy, len(group.bundles)) == ("ray", "PACK", 16)
    (group,) = place(roles, machines("8xH100,16xH100")).groups
    assert (group.executor, len(group.bundles)) == ("mp", 1)


def test_host_roles_are_slots_even_where_there_are_fewer_cores() -> None:
    roles = [RoleRequest(STUDENT, 2, CPU), RoleRequest(SCORER, 1, CPU, 2)]
    placement = place(roles, machines("2cpu"))
    assert placement.num_slots == 4
    assert placement.num_gpus == 0
    assert all("GPU" not in bundle for group in placement.groups for bundle in group.bundles)


def test_host_roles_must_fit_the_slots_of_a_cluster_that_runs_already() -> None:
    hardware = Hardware((Node("a", num_cpus=64, num_slots=2),))
    with pytest.raises(ConfigError, match=r"3 CPU slots.*the Ray cluster has 2.*--num-cpus"):
        place([RoleRequest(STUDENT, 3, CPU)], hardware)


def test_too_few_gpus_says_what_is_needed_registered_and_free() -> None:
    node = Node("a", num_cpus=8, gpus=("H100",) * 4, num_free_gpus=3)
    with pytest.raises(
        ConfigError, match=r"needs 6 GPUs .*student: 4 ranks, scorer: 1 replica of 2.*4 GPUs registered, 3 free"
    ):
        place([RoleRequest(STUDENT, 4, GPU), RoleRequest(SCORER, 1, GPU, 2)], Hardware((node,)))


def test_enough_gpus_in_pieces_that_are_too_small_is_an_error() -> None:
    roles = [RoleRequest(SCORER, 3, GPU, 4)]
    with pytest.raises(ConfigError, match=r"4 GPUs on one node.*per node: 6, 6"):
        place(roles, machines("6xH100,6xH100"))


def test_the_ranks_of_mixed_nodes_are_bound_to_one_kind_of_gpu() -> None:
    roles = [RoleRequest(STUDENT, 8, GPU), RoleRequest(SCORER, 2, GPU, 4)]
    for text in ("8xH100,8xA100", "8xH100,4xA100,8xA100"):
        groups = {group.name: group for group in place(roles, machines(text)).groups}
        assert all(bundle["accelerator_type:H100"] == 0.001 for bundle in groups["student"].bundles)
        assert "accelerator_type:A100" in groups["scorer-0"].bundles[0]
    groups = place(roles, machines("8xH100,8xH100")).groups
    assert not any(key.startswith("accelerator_type") for group in groups for key in group.bundles[0])


def test_ranks_that_fit_no_single_kind_are_spread() -> None:
    placement = place([RoleRequest(STUDENT, 12, GPU)], machines("8xH100,8xA100"))
    assert all(set(bundle) == {"CPU", "GPU"} for bundle in placement.groups[0].bundles)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
    st.integers(0, 6),
    st.lists(st.sampled_from([1, 2, 4]), max_size=3),
)
def test_whatever_can_be_placed_is_placed(nodes: list[int], ranks: int, shards: list[int]) -> None:
    """Against brute force over every assignment of replicas to nodes; sizes that divide each other, as people use."""
    hardware = Hardware(tuple(Node(str(i), 8, ("H100",) * count) for i, count in enumerate(nodes)))
    roles = [RoleRequest(SCORER, 1, GPU, size) for size in shards if size <= max(nodes)]
    sizes_needed = [role.shards for role in roles]
    roles += [RoleRequest(STUDENT, ranks, GPU)] if ranks else []
    possible = sum(sizes_needed) + ranks <= sum(nodes) and any(
        all(sum(s for s, at in zip(sizes_needed, where, strict=True) if at == n) <= nodes[n] for n in range(len(nodes)))
        for where in itertools.product(range(len(nodes)), repeat=len(sizes_needed))
    )
    if possible:
        assert place(roles, hardware).num_gpus == sum(sizes_needed) + ranks
    else:
        with pytest.raises(ConfigError):
            place(roles, hardware)


def test_ranks_are_numbered_by_node_and_gpu_whatever_the_order_of_actors() -> None:
    placed = [(0, "b", ["3"]), (1, "a", ["10"]), (2, "b", ["0"]), (3, "a", ["2"])]
    assert number_ranks(placed) == [
        RankPlace(actor=2, rank=0, local_rank=0, local_size=2, node="b"),
        RankPlace(actor=0, rank=1, local_rank=0, local_size=2, node="b"),
        RankPlace(actor=3, rank=2, local_rank=0, local_size=2, node="a"),
        RankPlace(actor=1, rank=3, local_rank=0, local_size=2, node="a"),
    ]
    assert number_ranks(placed[::-1]) == number_ranks(placed)


def test_host_ranks_count_up_on_their_node() -> None:
    places = number_ranks([(0, "a", []), (1, "b", []), (2, "a", [])])
    assert [(p.actor, p.rank, p.local_rank, p.local_size) for p in places] == [(0, 0, 0, 2), (2, 1, 1, 2), (1, 2, 0, 1)]


def test_a_gpu_given_to_two_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="GPU 1 of node a was given to student ranks 0 and 1"):
        number_ranks([(0, "a", ["1"]), (1, "a", ["1"])])
    assert len(number_ranks([(0, "a", ["1"]), (1, "b", ["1"])])) == 2
    with pytest.raises(ConfigError, match="one GPU each"):
        number_ranks([(0, "a", ["0", "1"]), (1, "a", ["2"])])


def test_this_host_is_described() -> None:
    (node,) = Hardware.local().nodes
    assert node.num_cpus >= 1
    assert node.memory_bytes > 2**28


@pytest.mark.parametrize(
    ("name", "expected"),
    [("H100", True), ("A100", True), ("L4", True), ("GeForce-RTX-3090", True), ("V100", False), ("Tesla-V100", False),
     ("T4", False), ("GeForce-RTX-2080-Ti", False), ("GTX 1080", False), ("P40", False), ("A40", True)],
)  # fmt: skip
def test_gpus_older_than_ampere_have_no_bfloat16(name: str, expected: bool) -> None:
    assert gpu_has_bfloat16(name) == expected
