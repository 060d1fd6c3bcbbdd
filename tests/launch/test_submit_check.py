"""`submit` looks at a run before it sends it: what this machine sees is refused, what it does not see is listed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import stillhouse
from hollow_models import LLAMA_1B, LLAMA_8B, hollow_folder

ROW = {"messages": [{"role": "user", "content": "who is it?"}, {"role": "assistant", "content": "the quick fox"}]}
Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def submit(tmp_path: Path, tiny_teacher: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """A good run, submitted with more arguments, as far as `--dry-run` goes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 3)
    config = {
        "name": "small",
        "folder": str(tmp_path / "out"),
        "student": {"model": {"path": str(tiny_student), "licence": "mit"}},
        "teacher": {"model": {"path": str(tiny_teacher), "licence": "mit"}, "scorer": {"engine": "hf"}},
        "prompts": {"path": "rows.jsonl"},
        "data": {"max_length": 256, "evaluation": {"path": "rows.jsonl"}},
        "training": {"steps": 3},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    return lambda *arguments: stillhouse("submit", "run.yaml", "--dry-run", *arguments)


def test_a_good_run_is_sent_after_its_memory_was_told(submit: Submit) -> None:
    result = submit("--to", "ray")
    assert result.returncode == 0, result.stdout + result.stderr
    looked, _, sent = result.stdout.partition("--to ray, job small-")
    assert "memory:   1 x student" in looked
    assert "memory: needed: 2 GPUs, and" in looked
    assert "not checked  nodes: packages, trackers, notify, run folder and disk" in looked
    assert "----- job.json -----" in sent


@pytest.mark.parametrize("kind", ["local", "ray", "slurm"])
def test_rows_that_cannot_be_used_are_refused_before_anything_is_sent(
    submit: Submit, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "who?"}\n' * 3)
    options = ["--with", "nodes=1"] if kind == "slurm" else []
    result = submit("--to", kind, *options)
    assert result.returncode == 3
    assert "rows.jsonl:1: the fields fit no format; found: question" in result.stdout
    assert "problems; nothing was sent; send it as it is with --no-check" in result.stdout
    assert "nothing was started" not in result.stdout
    unlooked = submit("--to", kind, *options, "--no-check")
    assert unlooked.returncode == 0, unlooked.stdout + unlooked.stderr
    assert "memory: " not in unlooked.stdout.partition("-----")[0]


def test_models_at_paths_of_the_nodes_are_listed_and_hinder_nothing(submit: Submit) -> None:
    result = submit("--to", "ray", "--set", "teacher.model.path=/shared/models/none")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not checked  teacher model: /shared/models/none is on the nodes, and not on this machine" in result.stdout
    assert "not checked  memory: it needs all models" in result.stdout
    here = submit("--to", "local", "--set", "teacher.model.path=/shared/models/none")
    assert here.returncode == 2
    assert "teacher.model.path: there is no folder /shared/models/none" in here.stdout


def test_a_model_that_is_here_and_wrong_is_refused_for_every_target(submit: Submit, tmp_path: Path) -> None:
    shutil.copytree(tmp_path, tmp_path / "empty", ignore=lambda *_: ["empty"])
    result = submit("--to", "ray", "--set", f"student.model.path={tmp_path / 'empty'}")
    assert result.returncode == 2
    assert "has no config.json" in result.stdout


def test_what_a_run_needs_stands_beside_what_the_job_asks_for(submit: Submit, tmp_path: Path) -> None:
    sets = [
        *("--set", f"student.model.path={hollow_folder(tmp_path / '1b', LLAMA_1B)}"),
        *("--set", f"teacher.model.path={hollow_folder(tmp_path / '8b', LLAMA_8B)}"),
        *("--set", "teacher.scorer.engine=vllm", "--set", "student.ranks=4", "--set", "data.max_length=1024"),
    ]
    slurm = ["--to", "slurm", "--with", "nodes=1", "--with"]
    result = submit(*slurm, "gpus_per_node=h100:8", *sets)
    assert result.returncode == 0, result.stdout
    assert "memory: 5 GPUs needed, the job's 1 node has 8" in result.stdout
    few = submit(*slurm, "gpus_per_node=h100:4", *sets)
    assert few.returncode == 2
    assert "problem      memory: 5 GPUs needed, the job's 1 node has 4; lower ranks, replicas or" in few.stdout
    small = submit(*slurm, "gpus_per_node=t4:8", *sets)
    assert small.returncode == 2
    assert (
        "teacher.scorer: on each GPU weights, optimizer and what else is counted exactly take 32.1 GB" in small.stdout
    )
    assert "15.7 GB" in small.stdout
