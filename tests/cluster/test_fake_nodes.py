"""Two nodes with GPUs of different kinds that do not exist: which roles land where."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest
from fake_gpus import run_roles
from ray.util.placement_group import placement_group, remove_placement_group
from raylets import OBJECT_STORE_BYTES, ray_cluster

from cluster.lifecycle import ray_session
from cluster.placement.groups import RoleRequest
from cluster.placement.hardware import Hardware
from cluster.placement.reserve import PlacedGroups, create_groups, nodes_of
from cluster.placement.topology import place
from cluster.runtime import GPU, SCORER, STUDENT

KINDS = ("accelerator_type:H100", "accelerator_type:A100")
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


def test_small_groups_do_not_keep_a_large_one_out_when_others_leave(two_nodes: None) -> None:
    """Five GPUs of each node are free: the ranks fit at once, on both, where the teacher then never would."""
    import ray

    hogs = [placement_group([{"GPU": 1.0}] * 3 + [{kind: 0.001}], strategy="STRICT_PACK") for kind in KINDS]
    ray.get([hog.ready() for hog in hogs], timeout=60)
    wanted = place([RoleRequest(STUDENT, 10, GPU), RoleRequest(SCORER, 1, GPU, 6)], Hardware.of_ray())

    async def reserve_while_others_leave() -> PlacedGroups:
        reserving = asyncio.create_task(create_groups(wanted, timeout_s=90))
        await asyncio.sleep(3)
        for hog in hogs:
            remove_placement_group(hog)
        return await reserving

    groups = asyncio.run(reserve_while_others_leave())
    (student,), (scorer,) = groups.of_role(STUDENT), groups.of_role(SCORER)
    assert len(nodes_of(scorer)) == 1
    assert len(student.group.bundles) == 10
    groups.release()
