"""The nodes of a Ray cluster: which are alive, waiting until enough have joined, and which will be taken away.

The only file that reads Ray's table of nodes; draining nodes are in a private part of its state.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

from trainer.errors import InfrastructureError

JOIN_TIMEOUT_S = 600.0
"""Until the nodes of an allocation have joined, where the configuration says nothing."""

POLL_S = 1.0
SAY_EVERY_S = 15.0


def alive_nodes() -> dict[str, str]:
    """Name of every node that is alive, by node id: its host name and address."""
    alive = (node for node in ray.nodes() if node["Alive"])
    return {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in alive}


def wait_for_nodes(wanted: int, *, timeout_s: float, note: Callable[[str], None]) -> None:
    """Until at least `wanted` nodes have joined. `note` gets a line now and then.

    Raises `InfrastructureError` at the deadline, with how many are wanted and which have come.
    """
    started = said = time.monotonic()
    known: dict[str, str] = {}
    while len(alive := alive_nodes()) < wanted:
        now = time.monotonic()
        if alive != known or now - said > SAY_EVERY_S:
            note(f"waiting for nodes: {len(alive)} of {wanted} have joined after {now - started:.0f} s")
            known, said = alive, now
        if now - started > timeout_s:
            raise InfrastructureError(
                f"{len(alive)} of {wanted} nodes had joined the Ray cluster after {timeout_s:.0f} s: "
                f"{', '.join(sorted(alive.values()))}. See what `ray start` says on the others, or ask for fewer"
            )
        time.sleep(POLL_S)
    note(f"{len(alive)} nodes have joined: {', '.join(sorted(alive.values()))}")


def draining_nodes() -> dict[str, float | None]:
    """Node id -> seconds until it is taken away (None: nobody said), of every node that was given notice.

    `ray.nodes()` says nothing of it, no actor is told, and Ray has no public call: this is the one place that asks its
    private state.
    """
    from ray._private.state import state

    now_ms = time.time() * 1000
    return {
        node: max(0.0, (deadline_ms - now_ms) / 1000) if deadline_ms else None
        for node, deadline_ms in state.get_draining_nodes().items()
    }
