"""The device table row by row, ports, and what a rank's environment says."""

from __future__ import annotations

import itertools
import socket

import psutil
import pytest

from cluster import runtime
from cluster.runtime import ALL_ROLES, BOTH, CPU, ENGINES, GPU, SCORER, SETTINGS, STUDENT, RankPlace, environment
from trainer.build import FAST, LOG_LEVEL

HOST_ONLY = {
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
}


def place(rank: int = 1, local_rank: int = 1, local_size: int = 2) -> RankPlace:
    return RankPlace(rank, rank, local_rank, local_size, node="a")


@pytest.mark.parametrize("role", ALL_ROLES)
def test_settings_for_hosts_never_reach_a_gpu_role(role: str) -> None:
    assert not HOST_ONLY & set(environment(role, GPU))
    assert environment(role, GPU).get("DS_ACCELERATOR") != "cpu"
    assert environment(role, CPU)["OMP_NUM_THREADS"] == "1", "the same check must see them on a host"


def test_no_process_gets_two_values_of_a_variable() -> None:
    for role, accelerator in itertools.product(ALL_ROLES, BOTH):
        names = [row.name for row in SETTINGS if role in row.roles and accelerator in row.accelerators]
        assert len(names) == len(set(names)), (role, accelerator)


def test_every_row_says_for_whom_and_why() -> None:
    for row in SETTINGS:
        assert row.roles, row
        assert row.accelerators, row
        assert row.why, row


def test_processes_without_a_gpu_see_none() -> None:
    for role in ALL_ROLES:
        assert environment(role, CPU)["CUDA_VISIBLE_DEVICES"] == ""
    assert environment("controller", GPU)["CUDA_VISIBLE_DEVICES"] == ""
    for role in (STUDENT, *ENGINES):
        assert "CUDA_VISIBLE_DEVICES" not in environment(role, GPU), "Ray's own masking must stay"


def test_engines_run_in_their_actor_and_are_not_pinned_to_one_core() -> None:
    table = environment(SCORER, CPU)
    assert table["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert table["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert table["VLLM_USE_V2_MODEL_RUNNER"] == environment(SCORER, GPU)["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_options_of_a_run_are_added() -> None:
    table = environment(STUDENT, GPU, threads=12, offline=True, bytecode_folder="/x")
    assert (table["OMP_NUM_THREADS"], table["HF_HUB_OFFLINE"], table["PYTHONPYCACHEPREFIX"]) == ("12", "1", "/x")
    assert not {"HF_HUB_OFFLINE", "PYTHONPYCACHEPREFIX"} & set(environment(STUDENT, GPU))


def test_the_vllm_variables_exist_in_the_installed_vllm() -> None:
    vllm_envs = pytest.importorskip("vllm.envs")
    names = {row.name for row in SETTINGS if row.name.startswith("VLLM_")}
    assert names <= set(vllm_envs.environment_variables)


def test_a_rank_reads_its_place() -> None:
    table = runtime.student_environment(place(), world=2, address="127.0.0.1", port=2345)
    assert table == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "2345",
    }


def test_ranks_on_several_nodes_name_the_interface_that_reaches_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    table = runtime.student_environment(place(), world=4, address="127.0.0.1", port=2345)
    assert (table["GLOO_SOCKET_IFNAME"], table["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    assert "GLOO_SOCKET_IFNAME" not in runtime.student_environment(place(), world=4, address="127.0.0.1", port=2345)


def test_an_engine_names_its_own_address_on_the_way_to_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert runtime.network_environment(SCORER, towards="127.0.0.1") == {"VLLM_HOST_IP": "127.0.0.1"}
    own = [
        (entry.address, name)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name != "lo"
    ]
    for address, interface in own:  # the way to an own address leaves from that very address
        assert runtime.network_environment(SCORER, towards=address) == {
            "VLLM_HOST_IP": address,
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": f"={interface}",
        }
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.9")
    assert "VLLM_HOST_IP" not in runtime.network_environment(SCORER, towards="127.0.0.1")
    assert runtime.network_environment(SCORER, towards="no address") == {}


def test_a_free_port_is_one_that_nobody_listens_on() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert runtime.free_port() not in (0, taken.getsockname()[1])


def test_a_process_that_sees_one_gpu_uses_its_first() -> None:
    gpu = runtime.device_of(runtime.device_type_of(GPU), 0)
    assert (gpu.type, gpu.index) == ("cuda", 0)
    host = runtime.device_of(runtime.device_type_of(CPU), 3)
    assert (host.type, host.index) == ("cpu", None)
    runtime.enter_device(host)
    assert (runtime.backend_of(GPU), runtime.backend_of(CPU)) == ("nccl", "gloo")


def test_the_switch_of_the_fast_code_is_handed_on_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAST, raising=False)
    monkeypatch.delenv(LOG_LEVEL, raising=False)
    assert runtime.handed_on() == {}
    monkeypatch.setenv(FAST, "0")
    monkeypatch.setenv("ANOTHER", "1")
    assert runtime.handed_on() == {"STILLHOUSE_FAST": "0"}


@pytest.mark.parametrize(("level", "vllm"), [("debug", "DEBUG"), ("info", None), ("warning", None), ("error", "ERROR")])
def test_a_log_level_reaches_the_libraries_of_all_processes(
    level: str, vllm: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_LEVEL, level)
    environment = runtime.environment("scorer", CPU) | runtime.handed_on()
    assert environment[LOG_LEVEL] == level
    assert environment["VLLM_LOGGING_LEVEL"] == (vllm or "WARNING")
