"""A Ray cluster over the hosts of tests/support/hosts.py, as an administrator would start it: one `ray start` on each
host, a token, addresses named. Hosts that are not members only know its address and, if they are given it, the token.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hosts import Host, Process
from leftovers import once_gone

from cluster.lifecycle import ray_session

GCS_PORT = 6379
JOBS_PORT = 8265
OBJECT_STORE_BYTES = 120 * 2**20
START_TIMEOUT_S = 180.0
ANSWER = "the answer: "
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
            "RAY_gcs_server_port_wait_time_s": "120",
            "HF_HUB_OFFLINE": "1",
            "RAY_ADDRESS": self.address,
        }

    def start(self) -> None:
        """The head, then all others."""
        head = ["--head", "--port", GCS_PORT, "--dashboard-host", self.head.address, "--dashboard-port", JOBS_PORT]
        self._start(self.head, head)
        self.join(self.members[1:])

    def join(self, hosts: Iterable[Host]) -> None:
        """Start Ray on hosts that were off, or never on; one by one, for Ray gives a node 30 s to start."""
        for host in hosts:
            self._start(host, ["--address", self.address])

    def evaluate(self, expression: str, timeout_s: float = 180) -> Any:
        """What an expression is, as JSON, in a Python on the head that is connected to the cluster."""
        lines = (
            "import json, logging, ray",
            "ray.init(log_to_driver=False, logging_level=logging.ERROR)",
            f"print({ANSWER!r} + json.dumps({expression}))",
        )
        result = self.head.run(["python", "-c", "\n".join(lines)], self.env, timeout_s=timeout_s)
        assert result.returncode == 0, result.stdout
        # Ray says things of its own in between and afterwards, of nodes that died, for one.
        answers = [line for line in result.stdout.splitlines() if line.startswith(ANSWER)]
        assert answers, result.stdout
        return json.loads(answers[0].removeprefix(ANSWER))

    def nodes(self) -> dict[str, str]:
        """Host name -> node id of the living members."""
        return {name: node for node, name, alive in self._nodes() if alive}

    def names(self) -> dict[str, str]:
        """Node id -> host name, of members that have died, too."""
        return {node: name for node, name, _ in self._nodes()}

    def _nodes(self) -> list[tuple[str, str, bool]]:
        """Id, host and life of every node that ever was."""
        known = self.evaluate("[(n['NodeID'], n['NodeManagerAddress'], n['Alive']) for n in ray.nodes()]")
        names = {host.address: host.name for host in self.members}
        return [(node, names[address], alive) for node, address, alive in known]

    def _start(self, host: Host, options: list[Any]) -> None:
        common = ["--node-ip-address", host.address, "--num-cpus", self._slots, "--num-gpus", 0]
        common += ["--object-store-memory", OBJECT_STORE_BYTES, "--disable-usage-stats"]
        common += ["--labels", ",".join(f"{key}={value}" for key, value in self._labels[host.name].items())]
        environment = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        command = ["ray", "start", *map(str, options), *map(str, common)]
        result = host.run(command, environment, timeout_s=START_TIMEOUT_S)
        if result.returncode != 0 and "timed out during startup" in result.stdout:  # 30 s, which nothing can change
            host.run(["ray", "stop", "--force"], environment)
            result = host.run(command, environment, timeout_s=START_TIMEOUT_S)
        if result.returncode != 0:
            raise RuntimeError(f"Ray does not start on {host.name}: {result.stdout}")


def beside_daemons(host: Host) -> list[Process]:
    """What runs on a host that Ray itself does not need, zombies included."""
    processes = host.processes()
    dashboards = {one.pid for one in processes if DASHBOARD in one.command}
    theirs = {one.pid for one in processes if any(mark in one.command for mark in DAEMONS) or one.parent in dashboards}
    return [one for one in processes if one.pid not in theirs]


def settled(hosts: Iterable[Host], timeout_s: float = 90) -> list[str]:
    """What is still left on any host after Ray has had a moment to take its workers away; expected: nothing."""
    on = [host for host in hosts if host.is_on]
    return once_gone(lambda: [f"{host.name}: {one.command}" for host in on for one in beside_daemons(host)], timeout_s)
