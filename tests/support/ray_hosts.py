"""A Ray cluster over the hosts of tests/support/hosts.py, as an administrator would start it: one `ray start` on each
host, a token, addresses named. Hosts that are not members only know its address and, if they are given it, the token.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hosts import Host, Process

from cluster import ray_session

GCS_PORT = 6379
JOBS_PORT = 8265
OBJECT_STORE_BYTES = 120 * 2**20
START_TIMEOUT_S = 120.0
DASHBOARD = "/ray/dashboard/dashboard.py"  # its children are daemons, too
DAEMONS = (
    "/gcs_server",
    "/raylet/raylet",
    "/ray/autoscaler/_private/monitor.py",
    DASHBOARD,
    "/ray/_private/log_monitor.py",
    "ray.util.client.server",
    "ray-dashboard-",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "ray::IDLE",
)
"""What the command lines of Ray's own processes hold: what it keeps on a node without any job."""


class RayOnHosts:
    """The cluster: the first member is the head."""

    def __init__(
        self, members: Iterable[Host], *, shared: Path, labels: Mapping[str, Mapping[str, str]], slots: int = 2
    ) -> None:
        """`labels` of the node, by name of the host."""
        self.members = list(members)
        self.head = self.members[0]
        self.address = f"{self.head.address}:{GCS_PORT}"
        self.jobs_url = f"http://{self.head.address}:{JOBS_PORT}"
        self.token = shared / "token"
        self._slots = slots
        self._labels = labels
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))

    @property
    def env(self) -> dict[str, str]:
        """What a command on a member starts with, driver or daemon."""
        return {
            **ray_session.RAY_SETTINGS,
            "RAY_memory_monitor_refresh_ms": "0",  # every host sees the memory of the whole machine
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            # a dead node is noticed after a few seconds, not after a minute
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "4",
            "HF_HUB_OFFLINE": "1",
            "RAY_ADDRESS": self.address,
        }

    def start(self) -> None:
        """The head, then all others at the same time."""
        head = ["--head", "--port", GCS_PORT, "--dashboard-host", self.head.address, "--dashboard-port", JOBS_PORT]
        self._await(self.head, self._start(self.head, head))
        self.join(self.members[1:])

    def join(self, hosts: Iterable[Host]) -> None:
        """Start Ray on hosts that were off, or never on."""
        starting = {host: self._start(host, ["--address", self.address]) for host in hosts}
        for host, process in starting.items():
            self._await(host, process)

    def python(self, host: Host, code: str, *arguments: str, timeout_s: float = 60) -> Any:
        """What a piece of Python that is connected to the cluster prints last, as JSON."""
        lines = f"import json, logging, ray, sys\nray.init(log_to_driver=False, logging_level=logging.ERROR)\n{code}"
        result = host.run(["python", "-c", lines, *arguments], self.env, timeout_s=timeout_s)
        assert result.returncode == 0, result.stdout
        return json.loads(result.stdout.splitlines()[-1])

    def nodes(self) -> dict[str, str]:
        """Host name -> node id of the living members, by address."""
        alive = self.python(
            self.head,
            "print(json.dumps({n['NodeManagerAddress']: n['NodeID'] for n in ray.nodes() if n['Alive']}))",
        )
        names = {host.address: host.name for host in self.members}
        return {names[address]: node for address, node in alive.items()}

    def _start(self, host: Host, options: list[Any]) -> subprocess.Popen[str]:
        common = ["--node-ip-address", host.address, "--num-cpus", self._slots, "--num-gpus", 0]
        common += ["--object-store-memory", OBJECT_STORE_BYTES, "--disable-usage-stats"]
        common += ["--labels", ",".join(f"{key}={value}" for key, value in self._labels[host.name].items())]
        environment = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        return host.popen(
            ["ray", "start", *map(str, options), *map(str, common)],
            environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def _await(self, host: Host, process: subprocess.Popen[str]) -> None:
        output, _ = process.communicate(timeout=START_TIMEOUT_S)
        if process.returncode != 0:
            raise RuntimeError(f"Ray does not start on {host.name}: {output}")


def beside_daemons(host: Host) -> list[Process]:
    """What runs on a host that Ray itself does not need, zombies included."""
    processes = host.processes()
    dashboards = {one.pid for one in processes if DASHBOARD in one.command}
    theirs = {one.pid for one in processes if any(mark in one.command for mark in DAEMONS) or one.parent in dashboards}
    return [one for one in processes if one.pid not in theirs]


def settled(hosts: Iterable[Host], timeout_s: float = 20) -> list[str]:
    """What is still left on any host after Ray has had a moment to take its workers away; expected: nothing."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [f"{host.name}: {one.command}" for host in hosts if host.is_on for one in beside_daemons(host)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)
