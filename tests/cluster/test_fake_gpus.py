"""One node with eight GPUs that do not exist: who sees which."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import psutil
import pytest
from fake_gpus import Witness, ray_folder, run_roles
from machines import machines

from cluster.lifecycle import ray_session
from cluster.placement.groups import RoleRequest
from cluster.placement.hardware import Hardware
from cluster.placement.reserve import actor_options, create_groups
from cluster.placement.topology import place
from cluster.runtime import CONTROLLER, CPU, GPU, SCORER, STUDENT, environment
from trainer.errors import ConfigError, InfrastructureError

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def one_node() -> Iterator[ray_session.RayCluster]:
    """Ray as a run starts it, and nothing left of it afterwards."""
    with ray_folder(), own_handler() as handler:
        ray_cluster = ray_session.start_ray(num_cpus=24, num_gpus=8, object_store_bytes=80 * 2**20)
        assert signal.getsignal(signal.SIGTERM) is handler, "Ray would end the run without a checkpoint"
        assert ray_cluster.owned
        assert ray_cluster.temp_dir.is_dir()
        assert ray_cluster.processes
        yield ray_cluster
        family = [psutil.Process(pid) for pid in ray_cluster.processes]
        family += [child for process in family for child in process.children(recursive=True)]
        ray_session.stop_ray(ray_cluster)
        assert not [process for process in family if process.is_running()], "Ray left processes behind"
        assert not ray_cluster.temp_dir.exists()


def test_nothing_of_ray_answers_without_its_token_and_other_users_cannot_enter_its_folder(
    one_node: ray_session.RayCluster,
) -> None:
    family = [child for pid in one_node.processes for child in psutil.Process(pid).children(recursive=True)]
    family += [psutil.Process(pid) for pid in one_node.processes]
    places = {
        ("127.0.0.1" if listener.laddr.ip in ("0.0.0.0", "::") else listener.laddr.ip, listener.laddr.port)
        for process in family
        for listener in process.net_connections()
        if listener.status == psutil.CONN_LISTEN
    }
    assert len(places) > 3, "the control: Ray listens"
    assert [place for place in places if answers(*place)] == []
    assert one_node.temp_dir.stat().st_mode & 0o077 == 0


def answers(host: str, port: int) -> bool:
    """Whether a page is served to whoever asks. gRPC servers speak no HTTP/1 and refuse calls without the token."""
    try:
        urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10).close()
    except urllib.error.HTTPError as refused:
        return refused.code not in (401, 403)
    except (OSError, http.client.HTTPException):
        return False
    return True


@contextlib.contextmanager
def own_handler() -> Iterator[Callable[[int, object], None]]:
    """A handler of SIGTERM as a run has one."""

    def handler(number: int, frame: object) -> None:
        raise AssertionError("nobody sends this signal")

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


def test_one_node_shares_its_gpus_among_ranks_and_replicas(one_node: None) -> None:
    roles = [RoleRequest(STUDENT, 4, GPU), RoleRequest(SCORER, 2, GPU, 2)]
    places, rank_tables, teacher_places, teacher_tables = run_roles(place(roles, machines("8xH100")))
    assert [p.rank for p in places] == [0, 1, 2, 3]
    visible = [int(table["CUDA_VISIBLE_DEVICES"]) for table in rank_tables]
    assert visible == sorted(visible), "ranks of a node follow its GPUs"
    assert {table["LOCAL_RANK"] for table in rank_tables} == {"0"}, "Ray shows each rank one GPU only"
    assert {table["LOCAL_SIZE"] for table in rank_tables} == {"4"}
    assert {table["DS_ACCELERATOR"] for table in rank_tables} == {"cuda"}
    for (_, gpus), table in zip(teacher_places, teacher_tables, strict=True):
        assert table["CUDA_VISIBLE_DEVICES"] == ",".join(gpus)
        assert len(gpus) == 2
    for table in itertools.chain(rank_tables, teacher_tables):
        assert table["MALLOC_TOP_PAD_"] is None


def test_a_helper_sees_no_gpu_and_would_see_all_without_our_table(one_node: None) -> None:
    import ray

    actor = ray.remote(num_cpus=0)(Witness)
    helper = actor.options(runtime_env={"env_vars": environment(CONTROLLER, GPU)}).remote()
    bare = actor.remote()
    assert ray.get(helper.environment.remote(), timeout=60)["CUDA_VISIBLE_DEVICES"] == ""
    assert ray.get(bare.environment.remote(), timeout=60)["CUDA_VISIBLE_DEVICES"] is None
    for one in (helper, bare):
        ray.kill(one)


def test_host_roles_on_a_gpu_node_see_no_gpu(one_node: None) -> None:
    import ray

    groups = asyncio.run(create_groups(place([RoleRequest(STUDENT, 2, CPU)], machines("2cpu")), timeout_s=60))
    (student,) = groups.of_role(STUDENT)
    options = actor_options(student, environment=environment(STUDENT, CPU), bundle=1)
    rank = ray.remote(Witness).options(**options).remote()
    table = ray.get(rank.environment.remote(), timeout=60)
    assert (table["CUDA_VISIBLE_DEVICES"], table["OMP_NUM_THREADS"], table["DS_ACCELERATOR"]) == ("", "1", "cpu")
    assert table["MALLOC_TOP_PAD_"] == "33554432"
    groups.release()


def test_what_does_not_fit_is_given_back_with_the_numbers(one_node: None) -> None:
    import ray

    hog = asyncio.run(create_groups(place([RoleRequest(SCORER, 1, GPU, 6)], machines("8xH100")), timeout_s=60))
    wanted = place([RoleRequest(STUDENT, 2, GPU), RoleRequest(SCORER, 1, GPU, 4)], machines("8xH100"))
    with pytest.raises(
        InfrastructureError, match=r"insufficient resources for scorer-0 after 10 s.*needs 6 GPUs.*has 8 GPUs.*2 GPUs"
    ):
        asyncio.run(create_groups(wanted, timeout_s=10))
    hog.release()
    asyncio.run(create_groups(place([RoleRequest(SCORER, 1, GPU, 8)], machines("8xH100")), timeout_s=30)).release()
    assert ray.cluster_resources()["GPU"] == 8


def test_the_hardware_of_a_running_cluster_is_read(one_node: None) -> None:
    deadline = time.monotonic() + 20
    while Hardware.of_ray().nodes[0].free_gpus < 8:  # what earlier tests gave back arrives with a delay
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (node,) = Hardware.of_ray().nodes
    assert (len(node.gpus), node.num_slots, node.free_gpus) == (8, 24, 8)
    assert node.num_cpus == Hardware.local().num_cpus, "cores that exist, not slots"
    with pytest.raises(ConfigError, match="8 GPUs registered, 8 free"):
        place([RoleRequest(STUDENT, 9, GPU)], Hardware.of_ray())
