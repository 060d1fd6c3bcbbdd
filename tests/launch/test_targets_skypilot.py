"""The SkyPilot target: its YAML against a schema, its script at work on two played nodes, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
from launch_schemas import SKYPILOT_TASK
from ruamel.yaml import YAML
from slurm_stand_in import SlurmStandIn

from configs.load import load_run, load_section
from configs.paths import ROOT
from launch.bundle import Bundle, make_bundle
from launch.targets import load_target
from trainer.errors import ConfigError, InfrastructureError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
JOB = "demo-1122-030405-ab12"
FULL = (
    "nodes=2",
    "infra=k8s",
    "accelerators=H100:8",
    "cpus=32+",
    "memory=256+",
    "disk_gb=256",
    "image=docker:registry.example/stillhouse:1",
    "use_spot=true",
    "shared={/shared: team-volume}",
    "setup=[nvidia-smi]",
    "environment.NCCL_DEBUG=WARN",
    "secrets=[HF_TOKEN]",
)


def options(*given: str) -> Any:
    return load_section(load_target("skypilot").Options, None, given, title="options", option="--with")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    folder = tmp_path / "bundle"
    (folder / "code").mkdir(parents=True)
    (folder / "run.yaml").write_text("name: demo\n")
    run = load_run(ROOT / "configs" / "demo.yaml", ["folder=/shared/runs/demo"]).run
    return Bundle(folder, run, "0" * 16, ())


def task_of(shipment: Any) -> dict:
    return YAML(typ="safe").load(shipment.files["task.yaml"])


@pytest.mark.parametrize("given", [(), FULL], ids=["least", "full"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_task_of_every_shipped_configuration_is_what_skypilot_takes(
    config: Path, given: tuple[str, ...], tmp_path: Path, tiny_teacher: Path, tiny_student: Path
) -> None:
    models = [f"teacher.model.path={tiny_teacher}", f"student.model.path={tiny_student}"]
    made = make_bundle(config, ["folder=/shared/runs/x", *models], folder=tmp_path / "bundle")
    shipment = load_target("skypilot").prepare(made, options(*given), JOB)
    task = task_of(shipment)
    jsonschema.validate(task, SKYPILOT_TASK)
    for source in task["file_mounts"].values():
        assert (made.folder / source).exists()
    script = f"#!/bin/bash\n{task['run']}"
    checked = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("place", [(), ("resources",), ("resources", "job_recovery")], ids=str)
def test_a_misspelt_key_of_the_task_would_be_seen(bundle: Bundle, place: tuple) -> None:
    broken = copy.deepcopy(task_of(load_target("skypilot").prepare(bundle, options(*FULL), JOB)))
    inner = broken
    for part in place:
        inner = inner[part]
    key = next(iter(inner))
    inner[f"{key}z"] = inner.pop(key)
    with pytest.raises(jsonschema.ValidationError, match=f"{key}z|'{key}' is a required"):
        jsonschema.validate(broken, SKYPILOT_TASK)


def test_only_75_is_started_again_without_end(bundle: Bundle) -> None:
    recovery = task_of(load_target("skypilot").prepare(bundle, options(), JOB))["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 1, "recover_on_exit_codes": [75]}
    assert "resources" not in task_of(load_target("skypilot").prepare(bundle, options("managed=false"), JOB))


def test_secrets_go_by_name(bundle: Bundle) -> None:
    shipment = load_target("skypilot").prepare(bundle, options(*FULL), JOB)
    assert task_of(shipment)["secrets"] == {"STILLHOUSE_RAY_TOKEN": None, "HF_TOKEN": None}
    assert {"--secret=STILLHOUSE_RAY_TOKEN", "--secret=HF_TOKEN"} <= set(shipment.command)
    with pytest.raises(ConfigError, match=r"secrets=\[HF_TOKEN\]"):
        options("environment.HF_TOKEN=planted")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nodes=0", "greater than 0"),
        ("acelerators=H100:8", "did you mean 'accelerators'"),
        ("accelerators=H100:8:8", "accelerators"),
        ("shared={/a: x, /b: y}", "name one volume"),
    ],
)
def test_a_wrong_option_is_one_clear_message(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options(given)


def test_several_nodes_need_a_volume(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"--with shared='\{/shared: NAME\}'"):
        load_target("skypilot").prepare(bundle, options("nodes=2"), JOB)
    with pytest.raises(ConfigError, match="--set folder=/else/runs/demo"):
        load_target("skypilot").prepare(bundle, options("shared={/else: vol}"), JOB)


def test_the_first_node_ends_with_the_code_of_the_run_and_the_others_with_0(bundle: Bundle, tmp_path: Path) -> None:
    played = SlurmStandIn(tmp_path)
    home = tmp_path / "home"
    (home / "stillhouse").mkdir(parents=True)
    chosen = options("nodes=2", "shared={/shared: v}", f"python={played.python}")
    script = task_of(load_target("skypilot").prepare(bundle, chosen, JOB))["run"]
    secret = {"STILLHOUSE_RAY_TOKEN": "0123456789abcdef"}
    nodes = {"SKYPILOT_NODE_IPS": "0.0.0.0\n0.0.0.1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0"}
    environment = played.environment(**nodes, **secret, HOME=str(home), DRIVER="exit 75")
    first = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert first.returncode == 75, first.stderr
    assert played.wait_for_run().split()[1:] == [
        "--wait-for-nodes",
        "2",
        "0.0.0.0:6390",
        "token",
        "600",
        secret["STILLHOUSE_RAY_TOKEN"],
    ]
    second = subprocess.Popen(["bash", "-c", script], env={**environment, "SKYPILOT_NODE_RANK": "1"})
    try:
        node_of(second, played, timeout_s=60).terminate()  # as SkyPilot does where the first node has ended
        assert second.wait(timeout=60) == 0
    finally:
        second.kill()


def node_of(script: subprocess.Popen[bytes], played: SlurmStandIn, *, timeout_s: float) -> psutil.Process:
    """The script's Ray node: its other children are short-lived."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for child in psutil.Process(script.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if str(played.python) in child.cmdline():
                    return child
        time.sleep(0.05)
    raise AssertionError("no Ray node was started")


def test_submitting_hands_the_token_over_by_name(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sky").write_text('#!/bin/bash\nprintf "%s " "$@" "${#STILLHOUSE_RAY_TOKEN}" > called; ls >> called\n')
    (tmp_path / "sky").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    target, chosen = load_target("skypilot"), options()
    record = target.submit(bundle, target.prepare(bundle, chosen, JOB), chosen, JOB)
    called = (bundle.folder / "called").read_text().split()
    assert called[:3] == ["jobs", "launch", "--yes"]
    assert "64" in called
    assert {"task.yaml", "code", "run.yaml"} <= set(called)
    for verb in (target.status, target.stop, lambda known: target.logs(known, follow=True)):
        with pytest.raises(ConfigError, match="Type: sky jobs"):
            verb(record)
    (tmp_path / "sky").write_text("#!/bin/bash\necho 'No cloud access' >&2; exit 1\n")
    with pytest.raises(InfrastructureError, match="No cloud access"):
        target.submit(bundle, target.prepare(bundle, chosen, JOB), chosen, JOB)


def test_without_sky_or_a_secret_nothing_is_launched(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, chosen = load_target("skypilot"), options("secrets=[NOT_SET_ANYWHERE]")
    shipment = target.prepare(bundle, chosen, JOB)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sky on this machine"):
        target.submit(bundle, shipment, chosen, JOB)
    (tmp_path / "sky").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "sky").chmod(0o755)
    with pytest.raises(ConfigError, match="NOT_SET_ANYWHERE is not set"):
        target.submit(bundle, shipment, chosen, JOB)
