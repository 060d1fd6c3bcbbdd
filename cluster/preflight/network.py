"""Can the nodes work together: one process on each, first plain connections, then a real all-reduce with its numbers.

    peers start -> clocks compared -> each connects to the first -> gloo (nccl where all have GPUs): join, all-reduce
    every arrow has a deadline; a peer that does not come through is named, killed, and nothing is waited for

The group is made as the student's is, with the same environment, so that what works here works there.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import runtime
from cluster.lifecycle.calls import answers
from cluster.preflight.finding import Finding, ok, problem, warning
from cluster.runtime import RankPlace

START_TIMEOUT_S = 90.0
CONNECT_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 30.0
GROUP_TIMEOUT_S = 60.0  # gloo may take 75 s to notice that its own timeout has passed: nobody waits for that
CLOCK_SKEW_S = 2.0
LATENCY_ROUNDS = 30
BANDWIDTH_BYTES = 16 * 2**20
BANDWIDTH_ROUNDS = 3
SLOW_LATENCY_S = 0.01
SLOW_BYTES_PER_S = 100e6


@dataclass(frozen=True, slots=True)
class Measured:
    """What one peer saw of the group."""

    interface: str
    join_s: float
    latency_s: float  # of an all-reduce of one number, median
    bytes_per_s: float  # sent and received by each peer in an all-reduce of BANDWIDTH_BYTES, best


class Peer:
    """One process on a node. A Ray actor."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def listen(self) -> tuple[str, str, int]:
        """Host name, address and a port on which this process accepts connections for a while."""
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.bind(("", 0))
        self._listener.listen(256)
        import torch.distributed  # noqa: F401 - a slow start is not a slow network

        return socket.gethostname(), ray.util.get_node_ip_address(), self._listener.getsockname()[1]

    def clock(self) -> float:
        return time.time()

    def connect(self, address: str, port: int) -> str | None:
        """None where a connection is made, else why not."""
        try:
            socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            return str(error.strerror or error)
        return None

    def free_port(self) -> int:
        if self._listener is not None:
            self._listener.close()
        return runtime.free_port()

    def reduce(self, place: RankPlace, world: int, address: str, port: int, accelerator: runtime.Accelerator) -> Any:
        """Join the group and measure; collective. Raises RuntimeError with what the library says."""
        os.environ.update(runtime.student_environment(place, world=world, address=address, port=port))
        import torch
        from torch import distributed

        device = runtime.device_of(runtime.device_type_of(accelerator))
        runtime.enter_device(device)
        started = time.monotonic()
        distributed.init_process_group(
            runtime.backend_of(accelerator),
            init_method="env://",
            rank=place.rank,
            world_size=world,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
        )
        one = torch.ones(1, device=device)
        distributed.all_reduce(one)
        joined = time.monotonic()
        if one.item() != world:
            raise RuntimeError(f"the sum of {world} ones is {one.item()}")
        latencies = [_timed(distributed.all_reduce, one) for _ in range(LATENCY_ROUNDS)]
        many = torch.ones(BANDWIDTH_BYTES // 4, device=device)
        moved = 2 * (world - 1) / world * BANDWIDTH_BYTES  # by each peer of a ring
        best = min(_timed(distributed.all_reduce, many) for _ in range(BANDWIDTH_ROUNDS))
        names = [n for n in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if n in os.environ]
        chosen = os.environ[names[0] if accelerator == runtime.GPU else names[-1]] if names else "of the host name"
        distributed.destroy_process_group()
        return Measured(chosen, joined - started, statistics.median(latencies), moved / best)


def _timed(reduce: Any, tensor: Any) -> float:
    started = time.monotonic()
    reduce(tensor)
    tensor[0].item()  # a GPU answers when it is done
    return time.monotonic() - started


def examine_network(nodes: Mapping[str, str], *, accelerator: runtime.Accelerator) -> list[Finding]:
    """Findings about the nodes (id -> name) together; with one node there is nothing to find."""
    if len(nodes) < 2:
        return [ok(runtime.backend_of(accelerator), "one node: nothing to reach")]
    peers = {node: _peer(node, accelerator) for node in nodes}
    try:
        return asyncio.run(_examine(nodes, peers, accelerator))
    finally:
        for peer in peers.values():
            ray.kill(peer)


async def _examine(
    nodes: Mapping[str, str], peers: Mapping[str, Any], accelerator: runtime.Accelerator
) -> list[Finding]:
    backend = runtime.backend_of(accelerator)
    placed = await answers({node: peer.listen.remote() for node, peer in peers.items()}, START_TIMEOUT_S)
    silent = [f"{nodes[node]}: {answer}" for node, answer in placed.items() if isinstance(answer, str)]
    if silent:
        advice = "look at `ray status` and at /tmp/ray/session_latest/logs/raylet.out of the node"
        return [problem(backend, f"a process does not start on {text}", advice) for text in silent]
    clocks = await _clocks(nodes, peers)
    first, *others = nodes
    _, address, port = placed[first]
    asked = {node: peers[node].connect.remote(address, port) for node in others}
    reached = await answers(asked, 2 * CONNECT_TIMEOUT_S)
    cut = [f"{nodes[node]} cannot connect to {nodes[first]}: {why}" for node, why in reached.items() if why is not None]
    if cut:
        advice = "let the nodes reach each other on all ports above 1024 (firewall, security group, network policy)"
        return [clocks, *(problem("connections", text, advice) for text in cut)]
    found = [clocks, ok("connections", f"all reach {nodes[first]} on port {port}")]
    port = (await answers({first: peers[first].free_port.remote()}, START_TIMEOUT_S))[first]
    if isinstance(port, str):
        return [*found, problem(backend, f"{nodes[first]} does not answer any more: {port}", "run doctor again")]
    refs = {
        node: peer.reduce.remote(RankPlace(rank, rank, 0, 1, node), len(nodes), address, port, accelerator)
        for rank, (node, peer) in enumerate(peers.items())
    }
    return [*found, _group(nodes, await answers(refs, GROUP_TIMEOUT_S), backend)]


def _group(nodes: Mapping[str, str], measured: Mapping[str, Any], backend: str) -> Finding:
    failed = [f"{nodes[node]}: {text}" for node, text in measured.items() if isinstance(text, str)]
    if failed:
        advice = (
            "see that each host name resolves to the address of its node (not 127.*), or name the network in "
            f"{backend.upper()}_SOCKET_IFNAME on every node before ray start; unset it where it is wrong"
        )
        return problem(backend, "no all-reduce. " + "; ".join(failed), advice)
    interfaces = ", ".join(f"{nodes[node]} by {one.interface}" for node, one in measured.items())
    latency = max(one.latency_s for one in measured.values())
    speed = min(one.bytes_per_s for one in measured.values())
    joined = max(one.join_s for one in measured.values())
    text = (
        f"{len(nodes)} nodes joined in {joined:.1f} s; all-reduce takes {latency * 1e3:.2f} ms, and moves "
        f"{speed / 1e6:.0f} MB/s a node ({interfaces})"
    )
    if latency > SLOW_LATENCY_S or speed < SLOW_BYTES_PER_S:
        return warning(backend, text, "slow for training: is this the network that is meant for it?")
    return ok(backend, text)


async def _clocks(nodes: Mapping[str, str], peers: Mapping[str, Any]) -> Finding:
    """Against this process, each answer taken to be from the middle of its way there and back."""
    off: dict[str, float] = {}
    for node, peer in peers.items():
        asked = time.time()
        there = (await answers({node: peer.clock.remote()}, CONNECT_TIMEOUT_S))[node]
        if isinstance(there, float):
            off[node] = there - (asked + time.time()) / 2
    wrong = [f"{nodes[node]} is {skew:+.1f} s off" for node, skew in off.items() if abs(skew) > CLOCK_SKEW_S]
    if wrong:
        return warning("clocks", "; ".join(wrong), "turn on chrony or ntp: times in logs and the timeline lie")
    return ok("clocks", f"within {max(map(abs, off.values()), default=0.0):.2f} s of this one")


def _peer(node: str, accelerator: runtime.Accelerator) -> Any:
    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": 1 if accelerator == runtime.GPU else 0,
        "max_restarts": 0,
        "runtime_env": {"env_vars": runtime.environment(runtime.STUDENT, accelerator)},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    return ray.remote(Peer).options(**options).remote()
