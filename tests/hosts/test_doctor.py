"""`stillhouse doctor` on separate hosts: what it says of traps that one machine alone cannot have, and that it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import pytest
from hosts import Hosts, why_not
from ray_hosts import RayOnHosts
from tiny_runs import tiny_run

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

COMMAND = ["python", "-m", "launch", "doctor"]


class Cluster(RayOnHosts):
    """Whose members may start with further variables."""

    more: Mapping[str, str] = {}

    @property
    def env(self) -> dict[str, str]:
        return {**super().env, **self.more}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two members, of which the second resolves its own name to 127.0.1.1, and one more with a dead interface."""
    with Hosts.create(3, folder=tmp_path_factory.mktemp("hosts")) as hosts:
        hosts[1].resolve_own_name("loopback")
        hosts[2].add_dead_interface()
        yield hosts


@pytest.fixture(scope="module")
def cluster(hosts: Hosts) -> Cluster:
    members = Cluster(list(hosts)[:2], shared=hosts.shared, labels={host.name: {"host": host.name} for host in hosts})
    members.start()
    return members


def test_a_name_that_is_loopback_and_a_folder_that_is_not_shared_are_found(hosts: Hosts, cluster: Cluster) -> None:
    config = tiny_run(hosts.shared / "place", {"folder": "/tmp/run"})
    result = hosts[0].run([*COMMAND, str(config)], cluster.env, timeout_s=300)
    said = result.stdout
    assert result.returncode == 1, said
    assert "2 alive: host1 (10.77.0.11), host2 (10.77.0.12)" in said
    second = said.partition("\nhost2 (")[2].partition("\nthe cluster")[0]
    assert "cannot read the run folder" in second
    assert said.count("cannot read the run folder") == 1, "the first host sees its own"

    result = hosts[0].run([*COMMAND, str(config), "--set", f"folder={hosts.shared}/run"], cluster.env, timeout_s=300)
    said = result.stdout
    assert result.returncode == 0, said
    assert said.count("sees the run folder") == 2
    assert "host2 is 127.0.1.1: other nodes cannot reach that" in said
    assert "host1 is 10.77.0.11" in said
    assert "gloo             2 nodes joined in" in said, "through the interface, whatever the name says"
    assert "(host1 (10.77.0.11) by eth0, host2 (10.77.0.12) by eth0)" in said
    assert "warning   access" in said, "its dashboard is on the network"


def test_a_machine_that_is_no_member_is_told_so(hosts: Hosts, cluster: Cluster) -> None:
    began = time.monotonic()
    result = hosts[2].run([*COMMAND, "--address", cluster.address], cluster.env, timeout_s=200)
    assert result.returncode == 1, result.stdout
    assert "problem   joining" in result.stdout
    assert "node" in result.stdout.partition("problem   joining")[2]
    assert time.monotonic() - began < 150


def test_a_member_that_nobody_can_reach_is_named_in_bounded_time(hosts: Hosts, cluster: Cluster) -> None:
    """A variable of the user's own names an interface that is not there: its peers would wait for 75 s."""
    cluster.more = {"GLOO_SOCKET_IFNAME": "eth7"}
    cluster.join([hosts[2]])
    cluster.more = {}
    began = time.monotonic()
    result = hosts[0].run(COMMAND, cluster.env, timeout_s=400)
    assert result.returncode == 1, result.stdout
    assert "problem   gloo" in result.stdout
    said = result.stdout.partition("problem   gloo")[2]
    assert "host3 (10.77.0.13): RuntimeError" in said
    assert "eth7" in said
    assert "-> see that each host name resolves" in said
    assert time.monotonic() - began < 300
