"""`launch.api` over Ray: what a notebook's stop button does, and what is left when the notebook is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from leftovers import GONE_WITHIN_S, leftovers, once_gone
from runs_under_fault import losses, when
from tiny_runs import tiny_run

from launch import api
from trainer.run_folder import read_json

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

LONG = {
    "student": {"ranks": 1},
    "training": {"steps": 400, "save_every": 0, "save_every_minutes": 0},
    "optimizer": {"schedule": "constant"},
    "report": {"generate": 0, "viewer_sequences": 0},
}
CELL = """
import sys
from launch import api
try:
    api.distil(sys.argv[1])
except KeyboardInterrupt:
    print("INTERRUPTED", flush=True)
"""


def cell(config: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process that calls `distil`, as the kernel of a notebook."""
    return subprocess.Popen(
        [sys.executable, "-c", CELL, str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def test_a_run_on_ray_from_a_mapping_learns_and_leaves_nothing(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    lines: list[str] = []
    config = YAML(typ="safe").load(tiny_run(tmp_path, {"student": {"ranks": 1}}).read_text())
    result = api.distil(config, log=lines.append)
    kl = result.evaluations["forward_kl"]
    assert kl.iloc[-1] < 0.8 * kl.iloc[0]
    assert any(line.startswith("step 8/8") for line in lines)
    assert len(result.steps) == 8


def test_the_stop_button_saves_a_checkpoint_and_the_same_call_goes_on(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, LONG)
    run = tmp_path / "run"
    with leftovers() as marked:
        kernel = cell(config, marked.environment)
        when(run, lambda: len(losses(run)) >= 2, kernel)
        os.killpg(kernel.pid, signal.SIGINT)  # as Jupyter sends it: to the whole group
        output, _ = kernel.communicate(timeout=600)
        assert once_gone(marked.processes, GONE_WITHIN_S) == []
    assert output.endswith("INTERRUPTED\n"), output
    assert read_json(run / "exit.json")["code"] == 75
    trained = max(losses(run))
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert str(trained) in checkpoint.name
    result = api.distil(config, {"training.steps": trained + 2}, log=lambda line: None)
    assert list(result.steps.index) == list(range(1, trained + 3))


def test_a_run_whose_notebook_is_killed_saves_and_ends_by_itself(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, LONG)
    run = tmp_path / "run"
    with leftovers() as marked:
        kernel = cell(config, marked.environment)
        when(run, lambda: len(losses(run)) >= 2, kernel)
        os.killpg(kernel.pid, signal.SIGKILL)
        kernel.communicate(timeout=600)
        assert once_gone(marked.processes, GONE_WITHIN_S) == []
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    assert list((run / "checkpoints").iterdir())
