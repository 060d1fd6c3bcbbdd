"""The hosts that the tests beside this file run on: what is separate, what is shared, and that nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hosts as harness
import pytest
from hosts import DEAD_ADDRESS, Hosts, pid_namespace, processes_in, wait_until, why_not
from leftovers import once_gone

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

LISTEN = """
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("listening", flush=True)
    connection, peer = server.accept()
    total = 0
    while data := connection.recv(1 << 16):
        total += len(data)
    print(peer[0], total, flush=True)
"""
SEND = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=2).sendall(bytes(1_000_000))"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Shared: a test leaves no process on them."""
    with Hosts.create(2, folder=tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def said(*lines: str) -> list[str]:
    return ["bash", "-c", "; ".join(lines)]


def test_each_host_has_its_own_name_address_processes_and_temporary_folders(two: Hosts) -> None:
    one, other = two
    for host in two:
        result = host.run(said("hostname", "ip -4 -br addr show eth0", "ls /sys/class/net", "cd /proc; ls -d [0-9]*"))
        name, address, *rest = result.stdout.split("\n")
        assert name == host.name
        assert f"{host.address}/24" in address
        assert rest[:2] == ["eth0", "lo"]
        assert 2 <= len(rest[2:-1]) <= 4, "process 1, the shell, ls"
    one.run(said("touch /tmp/mine /dev/shm/mine"))
    assert other.run(["find", "/tmp", "/dev/shm", "-maxdepth", "1", "-name", "mine"]).stdout == ""
    assert (one.tmp / "mine").exists()
    assert not Path("/tmp/mine").exists()


def test_the_interpreter_its_packages_and_the_shared_folder_are_the_same_everywhere(two: Hosts) -> None:
    (two.shared / "from_outside").write_text("hello")
    for host in two:
        result = host.run(["python", "-c", "import sys, pytest; print(sys.prefix, pytest.__file__)"])
        assert result.stdout.split() == [sys.prefix, pytest.__file__]
        assert host.run(["cat", two.shared / "from_outside"]).stdout == "hello"


def test_hosts_find_each_other_by_name_and_bytes_are_counted_on_the_wire(two: Hosts) -> None:
    one, other = two
    server = one.popen([sys.executable, "-c", LISTEN], stdout=subprocess.PIPE)
    assert server.stdout.readline() == "listening\n"
    received, sent = one.received_and_sent()[0], other.received_and_sent()[1]
    assert other.run([sys.executable, "-c", SEND, one.name]).returncode == 0
    assert server.communicate(timeout=60)[0] == f"{other.address} 1000000\n"
    for bytes_moved in (one.received_and_sent()[0] - received, other.received_and_sent()[1] - sent):
        assert 1_000_000 <= bytes_moved < 1_100_000


def test_a_pulled_cable_loses_packets_and_a_plugged_one_works_again(two: Hosts) -> None:
    one, other = two
    server = one.popen([sys.executable, "-c", LISTEN], stdout=subprocess.PIPE)
    server.stdout.readline()
    one.link_down()
    failed = other.run([sys.executable, "-c", SEND, one.address])
    assert "timed out" in failed.stdout
    one.link_up()
    wait_until(lambda: other.run([sys.executable, "-c", SEND, one.address]).returncode == 0, 20)
    assert "1000000" in server.communicate(timeout=60)[0]


def test_a_dead_interface_is_up_and_a_host_may_resolve_its_own_name_wrongly(two: Hosts) -> None:
    one, other = two
    one.add_dead_interface()
    assert f"{DEAD_ADDRESS}/24" in one.run(["ip", "-4", "-br", "addr", "show", "eth1"]).stdout
    expected = {"address": one.address, "loopback": "127.0.1.1", "dead_interface": DEAD_ADDRESS}
    for to, address in expected.items():
        one.resolve_own_name(to)
        assert one.run(["getent", "hosts", one.name]).stdout.split() == [address, one.name]
        assert other.run(["getent", "hosts", one.name]).stdout.split() == [one.address, one.name]


def test_children_of_dead_processes_are_reaped(two: Hosts) -> None:
    one = two[0]
    one.run(["bash", "-c", "for code in 0 1; do (sleep 5; exit $code) > /dev/null 2>&1 & done"])
    assert len(one.processes()) >= 2
    wait_until(lambda: not one.processes(), 30)


def test_a_zombie_of_a_living_parent_is_seen(two: Hosts) -> None:
    one = two[0]
    parent = one.popen([sys.executable, "-c", "import os, time; os.fork() or os._exit(0); time.sleep(60)"])
    wait_until(lambda: any(process.zombie for process in one.processes()), 30)
    one.send(parent, signal.SIGTERM)
    assert parent.wait(timeout=30) != 0
    assert once_gone(one.processes, 20) == []


def test_killing_a_host_ends_everything_in_it_and_nothing_beside_it(two: Hosts) -> None:
    one, other = two
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(99)"
    )
    inside = [host.popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE) for host in two]
    assert [process.stdout.readline() for process in inside] == ["on\n"] * 2
    namespace = one._namespace
    one.kill()
    assert processes_in(namespace) == []
    assert not one.is_on
    assert inside[0].wait(timeout=30) != 0
    assert inside[1].poll() is None
    assert len(other.processes()) == 1
    one.boot()
    assert one.run(["hostname"]).stdout == "host1\n"
    assert one.processes() == []
    assert one.run([sys.executable, "-c", f"import socket; socket.create_connection(('{other.address}', 9), 2)"]).stdout


def test_a_command_past_its_deadline_is_killed_with_its_output_kept(two: Hosts) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        two[0].run(said("echo begun", "sleep 60"), timeout_s=3)
    assert caught.value.output == "begun\n"
    wait_until(lambda: not two[0].processes(), 30)


SESSION = """
import os, sys, time
from pathlib import Path
from hosts import Hosts
with Hosts.create(2, folder=Path(sys.argv[1])) as hosts:
    hosts[0].popen(["sleep", "600"])
    print(hosts[0].run(["hostname", "-I"]).stdout.strip(), hosts[0]._namespace, hosts._switch.pid, flush=True)
    time.sleep(600)
"""


def test_two_sessions_do_not_meet_and_a_killed_one_leaves_nothing(two: Hosts, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(harness.__file__).parent)}
    command = [sys.executable, "-c", SESSION, str(tmp_path / "other")]
    session = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    address, namespace, switch = session.stdout.readline().split()
    assert address == two[0].address, "the same addresses, on another switch"
    assert int(namespace) != pid_namespace(os.getpid())
    assert len(processes_in(int(namespace))) == 2
    session.kill()
    session.wait()
    wait_until(lambda: not processes_in(int(namespace)) and not Path(f"/proc/{switch}").exists(), 30)
    assert {name for _, name in socket.if_nameindex()}.isdisjoint({"bridge", "to-host1"}), "nothing is named outside"


def test_a_machine_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no unshare" in why_not.__wrapped__()
