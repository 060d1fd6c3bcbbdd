"""One node of a Ray cluster under a launch script: its ports, its address, its child and what is left of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.lifecycle.ray_session import METRICS_CLOSED
from launch.ray_node import address_towards, free_ports, head_command, main, node_environment, run_ray, wait_for
from trainer.errors import InfrastructureError


def test_two_jobs_search_different_ports_and_step_over_taken_ones() -> None:
    first, second = free_ports(1, 2), free_ports(2, 2)
    assert not set(first) & set(second)
    assert free_ports(1, 2) == first
    with socket.create_server(("", first[0])):
        assert first[0] not in free_ports(1, 2)


def test_the_own_address_is_the_one_on_the_route_to_the_head() -> None:
    assert address_towards("127.0.0.1", 6379) == "127.0.0.1"


def test_waiting_for_a_head_ends_with_the_first_answer_or_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        wait_for("127.0.0.1", port, timeout_s=0)
    with pytest.raises(InfrastructureError, match=f"did not answer .* at 127.0.0.1:{port} within 0 s"):
        wait_for("127.0.0.1", port, timeout_s=0)


def test_an_error_is_one_line_and_the_exit_code_of_infrastructure(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    assert main(["join", "127.0.0.1", port, "--timeout-s", "0", "--", "--num-cpus=2"]) == 4
    assert capsys.readouterr().err.startswith("error: Ray's head did not answer")


def test_ray_is_told_address_ports_and_what_the_script_adds_and_has_no_dashboard() -> None:
    command = head_command("10.0.0.1", 10001, 10002, ["--num-cpus=3"])
    assert {"--head", "--node-ip-address=10.0.0.1", "--port=10001", "--num-cpus=3", "--block"} <= set(command)
    assert "--include-dashboard=false" in command


def test_workers_do_not_inherit_the_ranks_of_the_scheduler() -> None:
    kept = node_environment({"SLURM_PROCID": "0", "PMI_RANK": "0", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"})
    own = {*METRICS_CLOSED, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"}
    assert kept.keys() - own == {"PATH", "CUDA_VISIBLE_DEVICES"}
    assert node_environment({"DASHBOARD_METRIC_PORT": "44300"})["DASHBOARD_METRIC_PORT"] == "44300"


def test_the_exit_code_of_ray_is_passed_on_and_its_folder_removed(tmp_path: Path) -> None:
    note = tmp_path / "folder"
    code = f"import sys; open({str(note)!r}, 'w').write(sys.argv[-1]); sys.exit(7)"
    assert run_ray([sys.executable, "-c", code]) == 7
    folder = note.read_text().removeprefix("--temp-dir=")
    assert len(folder) <= 43
    assert not Path(folder).exists()


def test_a_signal_ends_ray_and_counts_as_success(tmp_path: Path) -> None:
    began = tmp_path / "began"
    child = f"import time; open({str(began)!r}, 'w'); time.sleep(100)"
    code = f"import sys; from launch.ray_node import run_ray; sys.exit(run_ray([sys.executable, '-c', {child!r}]))"
    node = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 30
    while not began.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    node.send_signal(signal.SIGTERM)
    assert node.wait(timeout=30) == 0
