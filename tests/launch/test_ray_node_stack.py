"""launch.ray_node with a real Ray, and what a node does that is told to end: the ground under the Slurm script and the
pods of the RayJob."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.lifecycle.ray_session import RAY_SETTINGS
from launch.ray_node import free_ports, wait_for

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

SMALL = ("--num-cpus=1", "--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0")
DRAIN_S = 30

WAIT_FOR_TWO = """
import time, ray
ray.init(logging_level="WARNING", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.2)
"""

SERVE_WHILE_DRAINING = (
    WAIT_FOR_TWO
    + """
import os, signal, sys
from ray._private.state import state

@ray.remote(num_cpus=1, resources={"here": 1})
class Rank:
    def step(self):
        return 1

rank = Rank.remote()
ray.get(rank.step.remote(), timeout=120)
os.kill(int(sys.argv[1]), signal.SIGTERM)
began = time.monotonic()
while not state.get_draining_nodes():
    assert time.monotonic() - began < 20, "no notice"
    time.sleep(0.2)
answers = 0
while time.monotonic() - began < float(sys.argv[2]) * 0.75:
    answers += ray.get(rank.step.remote(), timeout=7)
    time.sleep(0.2)
print("answered while draining:", answers)
"""
)


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Told to end at the latest when the test is over, also where it failed."""
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**inherited, **RAY_SETTINGS, "RAY_AUTH_TOKEN_PATH": str(token), "SLURM_PROCID": "0"}


@pytest.fixture
def head(environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    port, client_port = free_ports(os.getpid(), 2)
    command = [sys.executable, "-m", "launch.ray_node", "head", "127.0.0.1", str(port), str(client_port), "--", *SMALL]
    with (
        (tmp_path / "head.log").open("w") as log,
        ended(subprocess.Popen(command, env=environment, stdout=log)) as process,
    ):
        wait_for("127.0.0.1", port, timeout_s=120)
        yield process, port
        process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.fixture
def short_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def drive(code: str, environment: dict[str, str], port: int, *arguments: str) -> str:
    named = {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=named, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_nodes_meet_and_leave_neither_processes_nor_folders(
    head: tuple[subprocess.Popen, int], environment: dict[str, str], tmp_path: Path
) -> None:
    first, port = head
    command = [sys.executable, "-m", "launch.ray_node", "join", "127.0.0.1", str(port), "--", *SMALL]
    with (
        (tmp_path / "join.log").open("w") as log,
        ended(subprocess.Popen(command, env=environment, stdout=log)) as second,
    ):
        drive(WAIT_FOR_TWO, environment, port)
        started = family(first) + family(second)
        (ray_start,) = [process for process in psutil.Process(second.pid).children() if "--block" in process.cmdline()]
        (folder,) = [Path(word.removeprefix("--temp-dir=")) for word in ray_start.cmdline() if "--temp-dir=" in word]
        assert folder.is_dir()
        rays = [ray_start, *ray_start.children(recursive=True)]
        assert all("SLURM_PROCID" not in process.environ() for process in rays)
        for node in (second, first):
            node.send_signal(signal.SIGTERM)
        assert second.wait(timeout=60) == 0
        assert first.wait(timeout=60) == 0
    _, left = psutil.wait_procs(started, timeout=60)
    assert left == []
    assert not folder.exists()


def test_a_node_told_to_end_announces_it_and_serves_until_its_time_is_over(
    head: tuple[subprocess.Popen, int], environment: dict[str, str], tmp_path: Path, short_folder: str
) -> None:
    _, port = head
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--temp-dir={short_folder}"]
    place = [f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.1", '--resources={"here": 1}', *SMALL]
    told = {**environment, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)}
    with (
        (tmp_path / "pod.log").open("w") as log,
        ended(subprocess.Popen([*start, *place], env=told, stdout=log)) as pod,
    ):
        said = drive(SERVE_WHILE_DRAINING, environment, port, str(pod.pid), str(DRAIN_S))
        assert int(said.rpartition("answered while draining: ")[2]) >= 1
        pod.wait(timeout=DRAIN_S + 60)
