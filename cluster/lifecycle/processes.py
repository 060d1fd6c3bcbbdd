"""Ending the processes of actors for certain.

`ray.kill` asks the process to leave; one that is stopped or stuck in a driver call does not, and would keep its GPU
memory from its successor. So an actor says who it is when it starts, and who gives it up has it killed on its node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.lifecycle import guard, shared_memory

KILL_TIMEOUT_S = 20.0
LEAVING_S = 1.0
DYING_S = 5.0  # until the children of a killed process are gone, too


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one node; `created` guards against another process that got the same pid later."""

    node: str
    pid: int
    created: float
    shared_memory: tuple[str, ...] = ()  # names that it and its children leave behind when they are killed


def this_process() -> ProcessIdentity:
    """Who the calling actor is."""
    pid = os.getpid()
    return ProcessIdentity(ray.get_runtime_context().get_node_id(), pid, psutil.Process(pid).create_time())


def own_shared_memory() -> tuple[str, ...]:
    """The named segments that this process and its children use now; the session's guard is told."""
    family = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    segments = tuple(sorted(set().union(*map(shared_memory.used_by, family))))
    guard.remember(segments)
    return segments


def kill_local(identity: ProcessIdentity) -> bool:
    """SIGKILL the process and its children if they still run after a moment, and remove what they shared. Returns
    whether it ran.

    The moment is for what `ray.kill` has asked for: of a process that it finds killed, Ray warns the user.
    """
    ran = False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(identity.pid)
        if process.create_time() == identity.created:
            family = [process, *process.children(recursive=True)]
            ran = True
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(LEAVING_S)
            for member in reversed(family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
    deadline = time.monotonic() + DYING_S
    while (left := shared_memory.remove_unused(identity.shared_memory)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        logging.getLogger(__name__).warning("still in use, and so not removed: %s", ", ".join(sorted(left)))
    return ran


def kill_actor(actor: Any, identity: ProcessIdentity | None) -> list[Any]:
    """Give an actor up: `ray.kill`, and where its process is known, something on its node that makes sure: a thread of
    this process, or a task of another node, which may need a process of its own.

    Returns what `wait_killed` waits for. A node that is gone has ended its processes with it.
    """
    ray.kill(actor, no_restart=True)
    if identity is None:
        return []
    if identity.node == ray.get_runtime_context().get_node_id():
        killing = threading.Thread(target=kill_local, args=(identity,), daemon=True, name="kill")
        killing.start()
        return [killing]
    there = NodeAffinitySchedulingStrategy(identity.node, soft=False)
    return [ray.remote(kill_local).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(identity)]


def wait_killed(killings: Iterable[Any]) -> None:
    """Until what `kill_actor` began is carried out, or its node turned out to be gone; bounded."""
    deadline, refs = time.monotonic() + KILL_TIMEOUT_S, []
    for killing in killings:
        if isinstance(killing, threading.Thread):
            killing.join(max(0.0, deadline - time.monotonic()))
        else:
            refs.append(killing)
    with contextlib.suppress(RayError):
        ray.get(refs, timeout=max(0.0, deadline - time.monotonic()))
