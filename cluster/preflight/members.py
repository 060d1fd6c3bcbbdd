"""The nodes of a Ray cluster that this process has joined: each by itself, and against each other.

A node is first asked what it runs, by a function that is sent by value (`node_checks.py`); only one with this very code
is then asked the rest, which is sent by name.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import runtime
from cluster.lifecycle.logs import SharedFolder
from cluster.lifecycle.nodes import alive_nodes, draining_nodes
from cluster.lifecycle.ray_token import WITHOUT_TOKEN, uses_token
from cluster.preflight import machine, node_checks, software
from cluster.preflight.finding import Finding, examine, ok, problem, warning
from cluster.preflight.network import answers, examine_network

NODE_TIMEOUT_S = 120.0
HTTP_TIMEOUT_S = 5.0

CLUSTER = "the cluster"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the doctor of a cluster is told. Plain values."""

    run_folder: str | None
    disk_bytes: int | None
    models: tuple[tuple[str, str | None], ...]
    needs_vllm: bool


Said = tuple[str, Finding]
"""(where, what)"""


def examine_members(asked: Asked, *, dashboard_url: str | None, warnings: tuple[str, ...]) -> Iterator[Said]:
    """All findings about the cluster. `dashboard_url` as Ray gives it, `warnings` of joining."""
    names = dict(sorted(alive_nodes().items(), key=lambda item: item[1]))
    own = ray.get_runtime_context().get_node_id()
    dead = [node["NodeManagerHostname"] for node in ray.nodes() if not node["Alive"]]
    yield CLUSTER, ok("nodes", f"{len(names)} alive: {', '.join(names.values())}")
    if dead:
        yield CLUSTER, warning("nodes", f"{len(dead)} left: {', '.join(dead)}", "harmless if they were meant to leave")
    for node, left_s in draining_nodes().items():
        when = "" if left_s is None else f" in {left_s:.0f} s"
        yield (
            CLUSTER,
            warning("nodes", f"{names.get(node, node)} is taken away{when}", "runs there save and end with 75"),
        )
    yield CLUSTER, access(dashboard_url, os.environ, joined_without_token=WITHOUT_TOKEN in warnings)
    with _shared(asked.run_folder) as shared:
        software_of = list(_compare(names, asked, shared))
    with_our_code = [node for node, finding in software_of if finding.status == "ok"]
    others = [node for node in with_our_code if node != own]
    machine_of = _ask(examine_node, others, asked, several_nodes=len(names) > 1)
    for node, name in names.items():
        answer = machine_of.get(node, [])
        found = [problem("node", answer, "look at its raylet's log")] if isinstance(answer, str) else brief(answer)
        of_node = [finding for asked_node, finding in software_of if asked_node == node]
        yield from ((name, finding) for finding in (*of_node, *found))
    together = {node: names[node] for node in with_our_code}
    yield from ((CLUSTER, finding) for finding in examine_network(together, accelerator=runtime.CPU))
    gpus = {node: name for node, name in together.items() if free_gpus(node)}
    if len(gpus) > 1:
        yield from ((CLUSTER, finding) for finding in examine_network(gpus, accelerator=runtime.GPU))


def brief(findings: list[Finding]) -> list[Finding]:
    """Of one node among many: what it is, what is wrong with it, and how much is not."""
    shown = [f for f in findings if f.status != "ok" or f.subject in ("processor", "accelerators")]
    well = len(findings) - len(shown)
    return [*shown, *([ok("other", f"{well} more things are as they should be")] if well else [])]


def examine_node(asked: Asked, object_store_bytes: int | None, several_nodes: bool) -> list[Finding]:
    """Everything about the machine that this runs on, as a member of a cluster."""
    circumstances = machine.Circumstances(
        run_folder=None if asked.run_folder is None else Path(asked.run_folder),
        disk_bytes=asked.disk_bytes,
        object_store_bytes=object_store_bytes,
        in_cluster=True,
        several_nodes=several_nodes,
    )
    looks = [*software.looks(needs_vllm=asked.needs_vllm), *machine.looks(circumstances, os.environ)]
    return list(examine(looks))


def access(dashboard_url: str | None, environment: Mapping[str, str], *, joined_without_token: bool) -> Finding:
    """Whether the cluster asks for a token, and from where its job API can be reached."""
    where = f"dashboard and job API at {dashboard_url}" if dashboard_url else "no dashboard"
    open_to_all = dashboard_url is not None and not dashboard_url.startswith(("127.", "localhost", "[::1]"))
    advice = "ray start --dashboard-host 127.0.0.1 and an ssh tunnel, or a firewall"
    if joined_without_token:
        return problem("access", f"{where}; {WITHOUT_TOKEN.partition(': ')[0]}", WITHOUT_TOKEN.partition(". ")[2])
    asks = None if dashboard_url is None else asks_for_token(f"http://{dashboard_url}/api/version")
    if asks is False and uses_token(environment):
        return problem(
            "access", f"{where}; it answers without a token", "set RAY_AUTH_MODE=token where the head starts"
        )
    if asks is None and dashboard_url is not None:
        return warning("access", f"{where} does not answer", "stillhouse submit --to ray needs it; see dashboard.log")
    if open_to_all:
        return warning("access", f"{where}: reachable from outside this machine, with the token", advice)
    return ok("access", f"{where}; " + ("a token is asked for" if asks else "joined with a token"))


def asks_for_token(url: str) -> bool | None:
    """Whether a request without a token is turned away; None where nobody answers."""
    try:
        urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return None
    return False


def free_gpus(node: str) -> bool:
    from ray._private.state import available_resources_per_node

    return available_resources_per_node().get(node, {}).get(runtime.GPU.upper(), 0) >= 1


def _compare(names: Mapping[str, str], asked: Asked, shared: SharedFolder | None) -> Iterator[tuple[str, Finding]]:
    """What the nodes run, against this process."""
    question = node_checks.Question(asked.models, asked.needs_vllm, shared or SharedFolder(Path("/"), ""))
    here = node_checks.facts_of(*node_checks.plain(question))
    for node, there in node_checks.ask_nodes(list(names), question, {}).items():
        if isinstance(there, str):
            yield node, problem("software", there, "look at `ray status`, and at the raylet's log of the node")
            continue
        if shared is None:
            there["folder_error"] = None
        found = node_checks.differences(here, there)
        if not found:
            folder = "" if shared is None else ", sees the run folder"
            yield node, ok("software", f"the same packages and the same code as here ({there['build']}){folder}")
        for text in found:
            yield node, problem("software", text, "make the nodes equal, or `stillhouse submit`, which ships the code")


@contextlib.contextmanager
def _shared(run_folder: str | None) -> Iterator[SharedFolder | None]:
    """A marked folder for the time of the question, in the run folder or the nearest one above it that exists. The mark
    of a run that goes on there is left alone."""
    if run_folder is None:
        yield None
        return
    place = next(path for path in (Path(run_folder), *Path(run_folder).parents) if path.is_dir())
    try:
        folder = tempfile.TemporaryDirectory(dir=place, prefix=".doctor-", ignore_cleanup_errors=True)
    except OSError:
        yield None  # that it cannot be written is a finding about this machine
        return
    with folder as name:
        yield SharedFolder.of(Path(name))


def _ask(
    question: Callable[..., list[Finding]], nodes: list[str], asked: Asked, *, several_nodes: bool
) -> dict[str, Any]:
    """Its answer on each node, or why there is none."""
    stores = {n["NodeID"]: n["Resources"].get("object_store_memory") for n in ray.nodes()}
    task = ray.remote(num_cpus=0, max_retries=0)(question)
    refs = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        store = None if stores.get(node) is None else int(stores[node])
        refs[node] = task.options(scheduling_strategy=there).remote(asked, store, several_nodes)
    return answers(refs, NODE_TIMEOUT_S)
