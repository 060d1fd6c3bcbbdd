"""Notices that a node will be taken away: what they mean for a run, and the poll that hears of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.lifecycle.nodes import alive_nodes, draining_nodes

POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class Drain:
    """Notice that a node will be taken away."""

    node: str  # as people know it
    seconds_left: float | None
    roles: Sequence[str]  # of the run, that sit there
    holds_controller: bool


@dataclass(frozen=True, slots=True)
class DrainEffect:
    stop: bool  # save a checkpoint and end, now
    text: str


def drain_effect(drain: Drain) -> DrainEffect | None:
    """What a notice means for the run: nothing (None), a teacher less for a while, or the end of it.

    Teachers are replaced wherever there is room. A student group restarts whole and from its last checkpoint, so it is
    better to save one while the node is still there; and the controller cannot move.
    """
    students = any(role.startswith("student") for role in drain.roles)
    if not drain.roles and not drain.holds_controller:
        return None
    when = "soon" if drain.seconds_left is None else f"in {drain.seconds_left:.0f} s"
    holders = [*drain.roles, *(["the run's own process"] if drain.holds_controller else [])]
    text = f"node {drain.node} will be taken away {when}, with {', '.join(holders)}"
    if students or drain.holds_controller:
        return DrainEffect(True, text)
    return DrainEffect(False, f"{text}: the teacher starts again elsewhere when it is gone, if there is room")


async def watch_for_drain(
    roles_on: Callable[[str], Sequence[str]],
    own_node: str,
    *,
    stop: Callable[[str], None],
    note: Callable[[str], None],
    draining: Callable[[], dict[str, float | None]] = draining_nodes,
    names: Callable[[], dict[str, str]] = alive_nodes,
    poll_s: float = POLL_S,
) -> None:
    """Until cancelled: `stop(why)` where a node of the students or of this process is to be taken away, a note where it
    is one of teachers. `roles_on(node)`: of the run, now; a notice is kept in mind until roles come to sit there.
    """
    told: set[str] = set()
    failed = False
    while True:
        try:
            for node, seconds in (await asyncio.to_thread(draining)).items():
                if node in told:
                    continue
                name = (await asyncio.to_thread(names)).get(node, node)
                effect = drain_effect(Drain(name, seconds, roles_on(node), holds_controller=node == own_node))
                if effect is None:
                    continue
                told.add(node)
                (stop if effect.stop else note)(effect.text)
        except Exception as error:  # noqa: BLE001 - Ray's state calls raise many types, and the next may answer
            if not failed:
                note(f"notices of nodes that will be taken away cannot be read just now: {error}")
            failed = True
        await asyncio.sleep(poll_s)
