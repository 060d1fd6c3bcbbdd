"""Separate hosts on one machine, so that a run on several nodes can be tested on a laptop or in CI.

A host is a process namespace with a reaping process 1, and with its own network, mounts (/tmp, /dev/shm, /etc/hosts),
name and IPC. Hosts are joined by a bridge that lies in a network namespace of its own. Nothing gets a name outside: two
test sessions cannot collide, and when a session dies, however it dies, the kernel takes everything with it.

    switch (network namespace): bridge --- veth --- eth0 of host1, 10.77.0.11
                                       --- veth --- eth0 of host2, 10.77.0.12
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CHECKOUT = Path(__file__).resolve().parents[2]
INIT = Path(__file__).with_name("host_init.py")
NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--ipc")
HOME = "/tmp/home"
DEAD_ADDRESS = "172.31.99.1"
BOOT_TIMEOUT_S = 60.0

OwnName = Literal["address", "loopback", "dead_interface"]


@functools.cache
def why_not() -> str | None:
    """Why this machine cannot make hosts; None where it can."""
    if os.geteuid() != 0:
        return "hosts need network namespaces: not root here"
    missing = [tool for tool in ("unshare", "nsenter", "ip", "mount") if shutil.which(tool) is None]
    if missing:
        return f"hosts need network namespaces: no {', '.join(missing)} here (util-linux, iproute2)"
    links = (
        "ip link add name br0 type bridge && ip link add name v0 type veth peer name v1 && mount -t tmpfs x /dev/shm"
    )
    trial = subprocess.run(["unshare", *NAMESPACES, "--fork", "sh", "-c", links], capture_output=True, text=True)
    return None if trial.returncode == 0 else f"hosts need network namespaces: {trial.stderr.strip()}"


@dataclass(frozen=True)
class Process:
    """A process of a host, as this machine sees it."""

    pid: int
    parent: int
    command: str
    zombie: bool


class Host:
    """One host. Made by `Hosts`; off until `boot`."""

    def __init__(self, name: str, address: str, *, folder: Path, network: Hosts) -> None:
        self.name = name
        self.address = address
        self.folder = folder
        self.tmp = folder / "tmp"
        """Its /tmp, seen from outside; /tmp/home is the home of who works there."""
        self._network = network
        self._hosts_file = folder / "hosts"
        self._unshare: subprocess.Popen[str] | None = None
        self._init = 0
        self._namespace = 0

    def boot(self, *, shared_memory_bytes: int = 2**30) -> None:
        """Switch on: process 1, mounts, network. Raises `RuntimeError` with what the host said."""
        assert self._unshare is None, f"{self.name} is on"
        shutil.rmtree(self.tmp, ignore_errors=True)
        (self.tmp / "home").mkdir(parents=True)
        self.tmp.chmod(0o1777)
        if not self._hosts_file.exists():
            self.resolve_own_name("address")
        settings = {
            "name": self.name,
            "shared_memory_bytes": shared_memory_bytes,
            "hosts_file": str(self._hosts_file),
            "tmp": str(self.tmp),
            "kept": kept_under_tmp([CHECKOUT, Path(sys.prefix), Path(sys.base_prefix), self._network.shared]),
        }
        init = [sys.executable, "-I", "-S", str(INIT), json.dumps(settings)]
        unshare = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        self._unshare = subprocess.Popen(
            [*unshare, *init],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        said = self._unshare.stdout.readline().strip()
        if said != "ready":
            said += self._unshare.communicate()[0]
            self._unshare = None
            raise RuntimeError(f"{self.name} does not boot: {said}")
        (self._init,) = children(self._unshare.pid)
        self._namespace = pid_namespace(self._init)
        self._network.plug(self._cable, self._init, number=int(self.address.rpartition(".")[2]))
        self._ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self._ip("link", "set", "eth0", "up")

    @property
    def is_on(self) -> bool:
        return self._unshare is not None

    def popen(
        self, command: Sequence[str | Path], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen:
        """Start a command here; `options` as of subprocess.Popen, `cwd` as this host sees it. Signals: `send`."""
        assert self.is_on, f"{self.name} is off"
        inside = ["env", "-C", str(options.pop("cwd", HOME)), *map(str, command)]
        options = {"text": True, "start_new_session": True, **options}
        return subprocess.Popen([*self._enter("-n", "-m", "-u", "-i", "-p"), *inside], env=self.env(env), **options)

    def run(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 180,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end, output captured together; at the deadline it is killed, and TimeoutExpired."""
        process = self.popen(command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            error.output, _ = process.communicate()
            raise
        return subprocess.CompletedProcess(list(map(str, command)), process.returncode, output, "")

    def env(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """What commands here start with: of this session's environment only where Python and its modules are."""
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        ours = {"HOME": HOME, "PATH": path, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        modules = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        return {**ours, **modules, **(more or {})}

    def send(self, process: subprocess.Popen, number: signal.Signals) -> None:
        """A signal to a command that `popen` started, not to what leads into the host."""
        for pid in children(process.pid):
            os.kill(pid, number)

    def processes(self) -> list[Process]:
        """Everything that runs here, process 1 left out."""
        return [one for one in processes_in(self._namespace) if one.pid != self._init] if self.is_on else []

    def kill(self) -> None:
        """Power off: everything here is gone when this returns. Nobody is told, and nothing is cleaned up."""
        assert self._unshare is not None, f"{self.name} is off"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        self._unshare.stdin.close()
        self._unshare.wait(timeout=BOOT_TIMEOUT_S)
        self._unshare.stdout.close()
        self._unshare = None
        # The network namespace, and our end of the cable with it, may outlive its last process for a moment.
        self._network.unplug(self._cable)

    def link_down(self) -> None:
        """Pull the cable at the switch: nobody here notices, packets are lost."""
        self._network.ip("link", "set", self._cable, "down")

    def link_up(self) -> None:
        self._network.ip("link", "set", self._cable, "up")

    def add_dead_interface(self, name: str = "eth1") -> None:
        """An interface that is up, has an address (the same everywhere) and leads nowhere, like container bridges."""
        self._ip("link", "add", name, "type", "bridge")
        self._ip("addr", "add", f"{DEAD_ADDRESS}/24", "dev", name)
        self._ip("link", "set", name, "up")

    def resolve_own_name(self, to: OwnName) -> None:
        """What /etc/hosts says about this host's own name: its address, Debian's 127.0.1.1, or the dead interface's."""
        own = {"address": self.address, "loopback": "127.0.1.1", "dead_interface": DEAD_ADDRESS}[to]
        lines = ["127.0.0.1 localhost"]
        lines += [f"{own if host is self else host.address} {host.name}" for host in self._network]
        self._hosts_file.parent.mkdir(parents=True, exist_ok=True)
        self._hosts_file.write_text("\n".join(lines) + "\n")  # in place: the mount shows it at once

    def received_and_sent(self, interface: str = "eth0") -> tuple[int, int]:
        """Bytes on an interface since it came up, link headers included."""
        for line in Path(f"/proc/{self._init}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                fields = counters.split()
                return int(fields[0]), int(fields[8])
        raise KeyError(f"{self.name} has no interface {interface}")

    @property
    def _cable(self) -> str:
        return f"to-{self.name}"

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", "-t", str(self._init), *namespaces, "--"]

    def _ip(self, *arguments: str) -> None:
        subprocess.run([*self._enter("-n"), "ip", *arguments], check=True, capture_output=True, text=True)


class Hosts(Sequence[Host]):
    """Hosts on one network, and a folder that all of them share."""

    def __init__(self, folder: Path, count: int) -> None:
        self.shared = folder / "shared"
        """The same folder at the same path on every host and outside."""
        self.shared.mkdir(parents=True)
        self._switch = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        wait_until(lambda: net_namespace(self._switch.pid) != net_namespace(os.getpid()), BOOT_TIMEOUT_S)
        self.ip("link", "add", "bridge", "type", "bridge")
        self.ip("link", "set", "bridge", "up")
        self._hosts: list[Host] = []
        for number in range(1, count + 1):
            name = f"host{number}"
            self._hosts.append(Host(name, f"10.77.0.{10 + number}", folder=folder / name, network=self))

    @classmethod
    @contextlib.contextmanager
    def create(cls, count: int, *, folder: Path | None = None) -> Iterator[Hosts]:
        """`count` hosts, switched on: host1, host2 ... All of it is gone afterwards, a folder made here included."""
        made = None if folder else Path(tempfile.mkdtemp(prefix="hosts-"))
        hosts = cls(folder or made, count)
        try:
            for host in hosts:
                host.boot()
            yield hosts
        finally:
            hosts.close()
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)

    def close(self) -> None:
        """Power off every host and take the switch away."""
        for host in self._hosts:
            if host.is_on:
                host.kill()
        self._switch.stdin.close()
        self._switch.wait(timeout=BOOT_TIMEOUT_S)

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def plug(self, cable: str, init: int, *, number: int) -> None:
        """A cable from the switch to eth0 of the network namespace of a process.

        Its hardware address follows from the number: peers of a host that was off for a while still know it.
        """
        peer = ("peer", "name", "eth0", "address", f"02:00:00:00:00:{number:02x}", "netns", str(init))
        self.ip("link", "add", cable, "type", "veth", *peer)
        self.ip("link", "set", cable, "master", "bridge", "up")

    def unplug(self, cable: str) -> None:
        self.ip("link", "del", cable, check=False)

    def ip(self, *arguments: str, check: bool = True) -> None:
        command = ["nsenter", "-t", str(self._switch.pid), "-n", "--", "ip", *arguments]
        subprocess.run(command, check=check, capture_output=True, text=True)


def kept_under_tmp(folders: Sequence[Path]) -> list[str]:
    """Those that a private /tmp would hide, a folder inside another left out."""
    inside = sorted({folder.resolve() for folder in folders if folder.resolve().is_relative_to("/tmp")})
    return [str(one) for one in inside if not any(one != other and one.is_relative_to(other) for other in inside)]


def wait_until(done: Any, timeout_s: float, every_s: float = 0.05) -> None:
    """Raises TimeoutError where `done()` stays false."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s")
        time.sleep(every_s)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def net_namespace(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/net").st_ino


def pid_namespace(pid: int) -> int:
    """The inode that names the process namespace of a process."""
    return os.stat(f"/proc/{pid}/ns/pid").st_ino


def processes_in(namespace: int) -> list[Process]:
    """The processes of a process namespace. A zombie has left its namespace: it counts where its parent lives."""
    found: list[Process] = []
    zombies: list[Process] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it may end while we look
            name, _, rest = (entry / "stat").read_text().rpartition(")")
            state, parent = rest.split()[:2]
            if state == "Z":
                zombies.append(Process(int(entry.name), int(parent), name.partition("(")[2], True))
            elif pid_namespace(int(entry.name)) == namespace:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(Process(int(entry.name), int(parent), command, False))
    inside = {process.pid for process in found}
    return [*found, *(zombie for zombie in zombies if zombie.parent in inside)]
