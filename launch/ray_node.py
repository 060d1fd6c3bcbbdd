"""`python -m launch.ray_node`: one node of a Ray cluster that lives as long as the job it belongs to.

A launch script starts it once on every host, in the foreground of whatever ends the job (a Slurm step, a container).
It finds the host's own address, waits for the head, keeps `ray start --block` as its child and ends what Ray leaves
behind, its folder too. A file of its own because shell is a poor place for routes, ports and deadlines; it imports no
Ray.

    ports JOB                 two free ports, the same search for the same job: one for Ray, one for its client server
    head ADDRESS PORT CLIENT  the node whose address ADDRESS is
    join ADDRESS PORT         any other node

What follows `--` are options of `ray start`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from cluster.lifecycle.guard import Guard
from cluster.lifecycle.ray_session import METRICS_CLOSED, ray_folder, session_folder
from trainer.errors import InfrastructureError, StillhouseError

FIRST_PORT, LAST_PORT = 20_000, 30_000
"""Above 19999, the last that Ray gives to its workers, and below what kernels give to outgoing connections, which would
take a port between the choice and its use."""

POLL_S = 0.5

GRACE_S = 3.0
"""For what outlives `ray start`: Ray's agents may take a minute to find that their raylet and the head are gone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: Ray's own, 0 where it was ended by a signal to this process, or that of the error on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    options, ray_options = _parser().parse_args(given[:cut]), given[cut + 1 :]
    try:
        if options.verb == "ports":
            print(*free_ports(options.job, 2))
            return 0
        if options.verb == "head":
            return run_ray(head_command(options.address, options.port, options.client_port, ray_options))
        wait_for(options.address, options.port, timeout_s=options.timeout_s)
        own = address_towards(options.address, options.port)
        return run_ray(join_command(options.address, options.port, own, ray_options))
    except StillhouseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def free_ports(job: int, count: int) -> list[int]:
    """Ports that nobody on this host listens on, searched upwards from a place that depends on the job's number, so
    that two jobs that begin at once do not meet. Raises `InfrastructureError` where there are none."""
    span = LAST_PORT - FIRST_PORT
    found: list[int] = []
    for offset in range(span):
        port = FIRST_PORT + (job * 16 + offset) % span
        if _is_free(port):
            found.append(port)
            if len(found) == count:
                return found
    raise InfrastructureError(f"{socket.gethostname()} has no {count} free ports between {FIRST_PORT} and {LAST_PORT}")


def address_towards(address: str, port: int) -> str:
    """The address by which this host reaches `address`: on hosts with several networks, the one the cluster is on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # a datagram socket: nothing is sent
        except OSError as error:
            raise InfrastructureError(
                f"{socket.gethostname()} has no route to Ray's head at {address}: {error.strerror or error}"
            ) from None
        return probe.getsockname()[0]


def wait_for(address: str, port: int, *, timeout_s: float) -> None:
    """Until somebody listens there. Raises `InfrastructureError` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"Ray's head did not answer {socket.gethostname()} at {address}:{port} within {timeout_s:.0f} s "
                    f"({error.strerror or error}). Its own output says why, or a firewall lies between the nodes"
                ) from None
        time.sleep(POLL_S)


def head_command(address: str, port: int, client_port: int, ray_options: Sequence[str] = ()) -> list[str]:
    """No dashboard: the run's own process stands beside the head, and what does not listen needs no guard."""
    return _ray_start(
        "--head",
        f"--node-ip-address={address}",
        f"--port={port}",
        f"--ray-client-server-port={client_port}",  # else 10001, which a second job of this host could not have
        "--include-dashboard=false",
        *ray_options,
    )


def join_command(address: str, port: int, own: str, ray_options: Sequence[str] = ()) -> list[str]:
    return _ray_start(f"--address={address}:{port}", f"--node-ip-address={own}", *ray_options)


def _ray_start(*options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        *options,
        "--disable-usage-stats",
        "--log-color=false",
        "--block",
    ]


def run_ray(command: Sequence[str]) -> int:
    """Keep a `ray start --block` until it ends or this process is told to; its folder goes with it."""
    folder = session_folder()
    asked: list[int] = []
    guard = Guard.of(str(folder), grace_s=GRACE_S)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # Ray hears of the end through this process
    child = subprocess.Popen([*command, f"--temp-dir={ray_folder(folder)}"], env=node_environment(os.environ))

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        child.terminate()  # Ray takes the first SIGTERM and ignores more: it may have been sent one itself

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *([] if ignored else [signal.SIGHUP])):
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        code = child.wait()
    finally:
        guard.release()
    return 0 if asked else code if code >= 0 else 128 - code


def node_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What Ray's processes, and so all workers on this node, start with: nothing of the scheduler's own ranks, which
    say 0 on every node, and no drain before the end, for the run has saved what it wanted when a node is ended."""
    foreign = ("SLURM_", "SKYPILOT_", "PMI")
    kept = {name: value for name, value in inherited.items() if not name.startswith(foreign)}
    return {**METRICS_CLOSED, **kept, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.ray_node", description="One node of Ray; after --: options of ray start."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    ports = verbs.add_parser("ports", help="print two free ports")
    ports.add_argument("job", type=int, help="number of the job")
    head = verbs.add_parser("head", help="be the head until a signal")
    join = verbs.add_parser("join", help="join the head until a signal")
    for verb in (head, join):
        verb.add_argument("address", help="of the head")
        verb.add_argument("port", type=int)
    head.add_argument("client_port", type=int)
    join.add_argument("--timeout-s", type=float, default=600, help="how long to wait for the head")
    return parser


if __name__ == "__main__":
    sys.exit(main())
