"""A Ray cluster that this process has joined, as `stillhouse doctor` looks at it: who is there, who may use it, each
node by itself, and the network between them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import ray

from cluster import runtime
from cluster.lifecycle.logs import SharedFolder
from cluster.lifecycle.nodes import alive_nodes, draining_nodes
from cluster.lifecycle.ray_token import WITHOUT_TOKEN, uses_token
from cluster.preflight.finding import Finding, ok, problem, warning
from cluster.preflight.machine import Needs, existing
from cluster.preflight.network import examine_network
from cluster.preflight.nodes import ask, compare, facts

HTTP_TIMEOUT_S = 5.0

CLUSTER = "the cluster"


def examine_members(needs: Needs, *, warnings: tuple[str, ...]) -> Iterator[tuple[str, Finding]]:
    """(where, what) of everything about the cluster. `warnings` of joining."""
    names = dict(sorted(alive_nodes().items(), key=lambda item: item[1]))
    yield from ((CLUSTER, finding) for finding in membership(names))
    dashboard_url = ray._private.worker.global_worker.node.webui_url or None
    yield CLUSTER, access(dashboard_url, os.environ, joined_without_token=WITHOUT_TOKEN in warnings)
    own = ray.get_runtime_context().get_node_id()
    equal: dict[str, str] = {}
    with _marked(needs) as marked:
        answers = asyncio.run(ask(names, marked))
    here = facts(needs)
    for node, name in names.items():
        found = compare(here, answers[node])
        if not any(finding.fatal and finding.subject == "software" for finding in found):
            equal[node] = name
        yield from ((name, finding) for finding in brief(found, own=node == own))
    yield from ((CLUSTER, finding) for finding in examine_network(equal, accelerator=runtime.CPU))
    gpus = {node: name for node, name in equal.items() if free_gpus(node)}
    if len(gpus) > 1:
        yield from ((CLUSTER, finding) for finding in examine_network(gpus, accelerator=runtime.GPU))


def membership(names: Mapping[str, str]) -> Iterator[Finding]:
    yield ok("nodes", f"{len(names)} alive: {', '.join(names.values())}")
    dead = [node["NodeManagerHostname"] for node in ray.nodes() if not node["Alive"]]
    if dead:
        yield warning("nodes", f"{len(dead)} left: {', '.join(dead)}", "harmless if they were meant to leave")
    for node, left_s in draining_nodes().items():
        when = "" if left_s is None else f" in {left_s:.0f} s"
        yield warning("nodes", f"{names.get(node, node)} is taken away{when}", "runs there save and end with 75")


def brief(findings: list[Finding], *, own: bool) -> Iterator[Finding]:
    """Of one node among many: what it is, what is wrong with it, and how much is not. Of the own node, at which this
    process has looked already, only what belongs to the cluster."""
    compared = ("software", "shared folder")
    shown = [f for f in findings if f.subject in compared or not own]
    told = [f for f in shown if f.status != "ok" or f.subject in (*compared, "processor", "accelerators")]
    yield from told
    if len(told) < len(shown):
        yield ok("other", f"{len(shown) - len(told)} more things are as they should be")


def access(dashboard_url: str | None, environment: Mapping[str, str], *, joined_without_token: bool) -> Finding:
    """Whether the cluster asks for a token, and from where its job API can be reached."""
    where = f"dashboard and job API at {dashboard_url}" if dashboard_url else "no dashboard"
    open_to_all = dashboard_url is not None and not dashboard_url.startswith(("127.", "localhost", "[::1]"))
    if joined_without_token:
        return problem("access", f"{where}; {WITHOUT_TOKEN.partition(': ')[0]}", WITHOUT_TOKEN.partition(". ")[2])
    asks = None if dashboard_url is None else asks_for_token(f"http://{dashboard_url}/api/version")
    if asks is False and uses_token(environment):
        advice = "set RAY_AUTH_MODE=token where the head starts"
        return problem("access", f"{where}; it answers without a token", advice)
    if asks is None and dashboard_url is not None:
        return warning("access", f"{where} does not answer", "stillhouse submit --to ray needs it; see dashboard.log")
    if open_to_all:
        advice = "ray start --dashboard-host 127.0.0.1 and an ssh tunnel, or a firewall"
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


@contextlib.contextmanager
def _marked(needs: Needs) -> Iterator[Needs]:
    """For the time of the question a marked folder in the run folder, or in the nearest above it that exists. The mark
    of a run that goes on there is left alone."""
    if needs.run_folder is None:
        yield needs
        return
    try:
        folder = tempfile.TemporaryDirectory(
            dir=existing(Path(needs.run_folder)), prefix=".doctor-", ignore_cleanup_errors=True
        )
    except OSError:  # that it cannot be written is a finding about this machine
        yield needs
        return
    with folder as name:
        yield replace(needs, shared=(name, SharedFolder.of(Path(name)).mark))
