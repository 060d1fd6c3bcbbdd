"""What nodes of a run may have otherwise, in words; and a real cluster with nodes that are not what they should be."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from raylets import Raylets, raylets

from cluster.lifecycle import ray_session
from cluster.lifecycle.logs import SharedFolder
from cluster.lifecycle.nodes import wait_for_nodes
from cluster.placement.groups import RoleRequest
from cluster.placement.hardware import Hardware
from cluster.placement.reserve import create_groups
from cluster.placement.topology import place
from cluster.preflight import nodes
from cluster.preflight.finding import problem
from cluster.preflight.machine import Needs
from cluster.preflight.nodes import PACKAGES, check_nodes, compare, facts, look
from cluster.runtime import CPU, SCORER, STUDENT
from configs.models import Constraints
from trainer.build import VARIABLE, build_hash
from trainer.errors import ConfigError, InfrastructureError

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    return folder


@pytest.fixture
def needs(tmp_path: Path, model: Path) -> Needs:
    run = tmp_path / "run"
    run.mkdir()
    folder = SharedFolder.of(run)
    return Needs(models=((str(model), None),), shared=(str(folder.path), folder.mark))


def on_node(needs: Needs) -> dict[str, Any]:
    """What this machine answers, asked as a node is."""
    return look(PACKAGES, build_hash(), asdict(needs))


def said(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return [finding.text for finding in compare(here, there) if finding.subject in nodes.REFUSED and finding.fatal]


def test_a_node_like_the_controller_differs_in_nothing(needs: Needs) -> None:
    there = on_node(needs)
    assert said(facts(needs), there) == []
    well = {finding.subject: finding.status for finding in compare(facts(needs), there)}
    assert well["software"] == well["label plug-in"] == well["shared folder"] == "ok"
    assert {"packages", "accelerators", "open files", "shared memory", "cache", "host name"} < set(well)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"versions": {"torch": "1.0"}}, "torch 1.0, here"),
        ({"versions": {"vllm": None}}, "vllm is not installed, here"),
        ({"versions": {"python": "3.10.1"}}, "python 3.10.1, here"),
        ({"build": "0" * 16, "code": "/elsewhere"}, "other code of Stillhouse, hash 0000000000000000 from /elsewhere"),
        ({"build_error": "ModuleNotFoundError: trainer"}, "Stillhouse cannot be imported"),
        ({"findings": [problem("label plug-in", "is not registered", "install it")]}, "is not registered"),
        ({"findings": [problem("shared folder", "cannot write")]}, "cannot write"),
    ],
)
def test_every_difference_is_said(needs: Needs, changes: dict[str, Any], expected: str) -> None:
    here, there = facts(needs), on_node(needs)
    for key, value in changes.items():
        there[key] = {**there[key], **value} if isinstance(value, dict) else value
    (found,) = said(here, there)
    assert expected in found


def test_models_that_are_missing_or_of_another_size_are_said(needs: Needs, model: Path) -> None:
    here = facts(needs)
    (model / "model.safetensors").write_bytes(b"w" * 50)
    smaller = on_node(needs)
    assert said(here, smaller) == [f"model {model}: model.safetensors has 50 bytes, here 100"]
    for file in model.iterdir():
        file.unlink()
    model.rmdir()
    assert said(here, on_node(needs)) == [f"model {model}: no such folder, and nothing in the hub's cache"]


def test_a_build_of_torch_for_other_devices_is_the_same_version(needs: Needs) -> None:
    here, there = facts(needs), on_node(needs)
    there["versions"]["torch"] = here["versions"]["torch"].partition("+")[0] + "+cu128"
    assert said(here, there) == []


def package_of_another_version(folder: Path, name: str, version: str) -> Path:
    """A folder that, first on the path of Python, says that a package has this version."""
    made = folder / f"{name}-{version}.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    folder = tmp_path_factory.mktemp("paths")
    skewed = package_of_another_version(folder / "skewed", "deepspeed", "0.1.2")
    older = package_of_another_version(folder / "older", "transformers", "4.30.0")
    with raylets({"good": {"kind": "good"}}) as made:
        for name, path in (("skewed", skewed), ("older", older)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", str(path), prepend=":")
                made.add(name, kind=name)
        joined = ray_session.start_ray(num_cpus=0)
        yield made
        ray_session.stop_ray(joined)


def check(cluster: Raylets, needs: Needs, *names: str) -> list[str]:
    """Notes about nodes that a run may start on."""
    notes: list[str] = []
    asyncio.run(check_nodes({cluster.node_id(n): (f"student on {n}",) for n in names}, needs, note=notes.append))
    return notes


@pytest.mark.stack
def test_nodes_with_other_packages_are_one_error_before_anything_starts(cluster: Raylets, needs: Needs) -> None:
    check(cluster, needs, "good")
    with pytest.raises(ConfigError) as caught:
        check(cluster, needs, "good", "skewed", "older")
    lines = str(caught.value).splitlines()
    assert "nothing starts on them" in lines[0]
    assert len(lines) == 3
    assert "student on skewed: deepspeed 0.1.2, here 0." in lines[1]
    assert "student on older: transformers 4.30.0, here 5." in lines[2]


@pytest.mark.stack
def test_a_process_with_other_code_than_the_controllers_refuses_to_be_an_actor(cluster: Raylets, needs: Needs) -> None:
    import ray

    from trainer.build import check_build

    task = ray.remote(num_cpus=0, max_retries=0)(check_build)
    ray.get(task.remote(), timeout=60)
    other = task.options(runtime_env={"env_vars": {VARIABLE: "0123456789abcdef"}})
    with pytest.raises(ConfigError, match="another version of Stillhouse"):
        ray.get(other.remote(), timeout=60)


@pytest.mark.stack
def test_labels_of_nodes_and_counts_of_nodes_place_roles_where_they_belong(cluster: Raylets) -> None:
    hardware = Hardware.of_ray()
    assert {node.labels.get("kind") for node in hardware.nodes} == {None, "good", "skewed", "older"}
    roles = [
        RoleRequest(STUDENT, 2, CPU, constraints=Constraints(nodes=2)),
        RoleRequest(SCORER, 1, CPU, constraints=Constraints(node_labels={"kind": "skewed"})),
    ]
    groups = asyncio.run(create_groups(place(roles, hardware), timeout_s=30, run_id="labels"))
    try:
        where = {cluster.name_of(node): names for node, names in groups.nodes().items()}
        assert where == {"skewed": ("scorer-0",), "good": ("student",), "older": ("student",)}
    finally:
        groups.release()


@pytest.mark.stack
def test_waiting_for_nodes_ends_when_they_are_there_or_says_how_many_came(cluster: Raylets) -> None:
    said: list[str] = []
    wait_for_nodes(4, timeout_s=10, note=said.append)
    assert "4 nodes have joined" in said[-1]
    with pytest.raises(InfrastructureError, match=r"4 of 9 nodes had joined the Ray cluster after 1 s: "):
        wait_for_nodes(9, timeout_s=1, note=said.append)
    assert any("waiting for nodes: 4 of 9" in text for text in said)


def test_a_node_without_stillhouse_answers_too(needs: Needs) -> None:
    """The question in a process where none of our packages can be imported."""
    import ray

    ray.cloudpickle.register_pickle_by_value(nodes)
    sent = ray.cloudpickle.dumps(look)
    ray.cloudpickle.unregister_pickle_by_value(nodes)
    code = (
        "import pickle, sys\n"
        "sys.modules |= dict.fromkeys(('configs', 'trainer', 'cluster', 'launch'))\n"
        "asked, question = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write(pickle.dumps(pickle.loads(asked)(*question)))"
    )
    stdin = pickle.dumps((sent, (PACKAGES, build_hash(), asdict(needs))))
    done = subprocess.run([sys.executable, "-c", code], input=stdin, capture_output=True, check=True, timeout=60)
    (found,) = said(facts(needs), pickle.loads(done.stdout))
    assert "Stillhouse cannot be imported (ModuleNotFoundError" in found
    assert "submit the run, which ships the code" in found
