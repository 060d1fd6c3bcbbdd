"""Two nodes with GPUs of different kinds that do not exist: which roles land where."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from fake_gpus import run_roles
from raylets import OBJECT_STORE_BYTES, ray_cluster

from cluster.lifecycle import ray_session
from cluster.placement.groups import RoleRequest
from cluster.placement.hardware import Hardware
from cluster.placement.topology import place
from cluster.runtime import GPU, SCORER, STUDENT

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """Joined as a run joins a cluster that runs already, and left running."""
    small = {"num_cpus": 16, "num_gpus": 8}
    with ray_cluster(**small, resources={"accelerator_type:H100": 1}) as (nodes, patch):
        nodes.add_node(**small, object_store_memory=OBJECT_STORE_BYTES, resources={"accelerator_type:A100": 1})
        patch.setenv("RAY_ADDRESS", nodes.address)
        joined = ray_session.start_ray(num_cpus=1)
        assert not joined.owned
        yield
        ray_session.stop_ray(joined)


def test_two_nodes_keep_replicas_whole_and_number_ranks_by_node(two_nodes: None) -> None:
    hardware = Hardware.of_ray()
    assert sorted(hardware.gpu_kinds) == ["A100", "H100"]
    roles = [RoleRequest(STUDENT, 8, GPU), RoleRequest(SCORER, 2, GPU, 4)]
    places, rank_tables, teacher_places, _ = run_roles(place(roles, hardware))
    assert len({node for node, _ in teacher_places}) == 1, "both replicas fill the node that the ranks left"
    assert {len(gpus) for _, gpus in teacher_places} == {4}
    assert len({p.node for p in places}) == 1
    assert [table["RANK"] for table in rank_tables] == [str(rank) for rank in range(8)]


def test_ranks_on_two_nodes_have_their_own_local_sizes(two_nodes: None) -> None:
    places, rank_tables, teacher_places, _ = run_roles(
        place([RoleRequest(STUDENT, 10, GPU), RoleRequest(SCORER, 1, GPU, 4)], Hardware.of_ray())
    )
    nodes = [p.node for p in places]
    assert [node for node, _ in itertools.groupby(nodes)] == list(dict.fromkeys(nodes)), "a node's ranks are neighbours"
    assert [int(table["LOCAL_SIZE"]) for table in rank_tables] == [nodes.count(node) for node in nodes]
    assert {table["LOCAL_RANK"] for table in rank_tables} == {"0"}
    assert len(teacher_places[0][1]) == 4
