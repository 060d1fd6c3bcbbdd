"""A Ray head with a dashboard and a token, started from an environment that has every package but Stillhouse itself."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.targets.ray_client import Client
from trainer.errors import StillhouseError

START_TIMEOUT_S = 120


@dataclass(frozen=True)
class RayHead:
    """A running head of one node."""

    address: str  # of the dashboard
    token_path: Path
    python: Path  # of the nodes
    temp_dir: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to be let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path)}

    def client(self) -> Client:
        return Client(self.address, token_path=str(self.token_path))


def environment_without_stillhouse(folder: Path) -> Path:
    """A virtual environment of links to the packages of this one, without Stillhouse; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    own = Path(sysconfig.get_paths()["purelib"])
    target = next(folder.glob("lib/python*/site-packages"))
    for entry in own.iterdir():
        if "stillhouse" not in entry.name.lower():
            (target / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    found = subprocess.run([python, "-I", "-c", "import trainer"], capture_output=True, text=True, timeout=60)
    assert "ModuleNotFoundError" in found.stderr, "Stillhouse is visible where it must not be"
    return python


@contextlib.contextmanager
def ray_head(folder: Path, *, num_cpus: int = 4) -> Iterator[RayHead]:
    """Start a head on this machine's loopback and end it, with every process it started, afterwards."""
    python = environment_without_stillhouse(folder / "nodes")
    token_path = folder / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32))
    temp_dir = Path(tempfile.mkdtemp(prefix="rh-"))  # short: its sockets' paths are limited
    port, dashboard_port = free_port(), free_port()
    environment = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        f"--port={port}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}", f"--num-cpus={num_cpus}", "--object-store-memory=300000000",
        f"--temp-dir={temp_dir}", f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    log = (folder / "ray-start.log").open("wb")
    with log:
        head = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_for_job_api(dashboard_port, head, folder / "ray-start.log", token_path)
        yield RayHead(f"http://127.0.0.1:{dashboard_port}", token_path, python, temp_dir)
    finally:
        family = [head, *head.children(recursive=True)] if head.is_running() else []
        head.terminate()
        _, left = psutil.wait_procs(family, timeout=30)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _wait_for_job_api(port: int, head: psutil.Popen, log: Path, token_path: Path) -> None:
    """The dashboard answers before its parts do: wait until jobs can be listed."""
    client = Client(f"http://127.0.0.1:{port}", token_path=str(token_path))
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            client.list_jobs()
            client.check_versions()
            return
        except StillhouseError as error:
            if head.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no job API: {error}\n{log.read_text()[-3000:]}") from error
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
