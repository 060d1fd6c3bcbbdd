"""Whole runs of several tasks and teachers: two vLLM teachers of which one is killed, and a run without any teacher."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from runs_under_fault import events, finish, held, losses, newest, start, when
from tiny_models import tiny_folder
from tiny_runs import records, run_of, stillhouse, tiny_run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]
ENGINE = {"kind": "vllm", "kv_cache_bytes": 32 * 2**20}
TOLERANCE = 1e-4


def two_teachers(folder: Path) -> Path:
    folder.mkdir(parents=True)
    tiny_folder(folder / "code", seed=3)
    teachers = {
        name: {"model": {"path": str(folder / path)}, "scorer": {"engine": ENGINE, "dtype": "float32"}}
        for name, path in (("prose", "teacher"), ("code", "code"))
    }
    code = {"teacher": "code", "labels": "hidden", "objective": [{"loss": "reverse_kl"}], "weight": 0.5}
    tasks = {"chat": {"teacher": "prose", "share": 3}, "code": code}
    return run_of(folder, {"student": {"ranks": 1}, "teachers": teachers, "tasks": tasks, "training": {"steps": 6}})


def test_one_of_two_teachers_killed_changes_nothing_and_their_tokens_add_up(tmp_path: Path) -> None:
    result = stillhouse("train", str(two_teachers(tmp_path / "calm")))
    assert result.returncode == 0, result.stdout + result.stderr
    process = start(two_teachers(tmp_path / "killed"))
    run = tmp_path / "killed/run"
    when(run, lambda: 1 in losses(run), process)
    with held(process):
        os.kill(newest(run, "code.scorer-0"), signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert len(events(run, "teacher_restart")) >= 1
    ours, theirs = losses(run), losses(tmp_path / "calm/run")
    assert ours.keys() == theirs.keys() == set(range(1, 7))
    assert all(abs(ours[step] - theirs[step]) <= TOLERANCE * abs(theirs[step]) for step in ours)
    for step in records(run, "step"):
        assert step["teacher/prose/tokens"] + step["teacher/code/tokens"] == step["train/tokens"]
        assert (step["task/chat/sequences"], step["task/code/sequences"]) == (6, 2), "shares 3 and 1 of 8"


def test_hard_labels_alone_need_no_teacher(tmp_path: Path) -> None:
    changes = {
        "runtime": "in_process",
        "student": {"ranks": 1},
        "labels": "none",
        "objective": [{"loss": "cross_entropy"}],
        "training": {"steps": 12},
    }
    config = run_of(tmp_path, changes)
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    trained = losses(tmp_path / "run")
    assert math.isfinite(trained[12])
    assert trained[12] < trained[1]
    assert records(tmp_path / "run", "evaluation") == []
    assert "there is no held-out KL" in result.stdout


def test_two_halves_of_a_dataset_as_tasks_train_as_the_whole_does(tmp_path: Path) -> None:
    changes = {"runtime": "in_process", "student": {"ranks": 1}, "data": {"shuffle": False}, "training": {"steps": 5}}
    whole = tiny_run(tmp_path / "whole", changes)
    halves: dict[str, Any] = {}
    lines = (tmp_path / "whole/train.jsonl").read_text().splitlines(keepends=True)
    for name, first in (("even", 0), ("odd", 1)):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(lines[first::2]))
        halves[name] = {"prompts": {"path": str(rows)}}
    unequal = {**halves, "odd": {**halves["odd"], "weight": 2.0}}
    found = {}
    for name, tasks in (("whole", {}), ("halves", halves), ("unequal", unequal)):
        config = tiny_run(tmp_path / name, {**changes, "tasks": tasks}) if tasks else whole
        result = stillhouse("train", str(config))
        assert result.returncode == 0, result.stdout + result.stderr
        found[name] = losses(tmp_path / name / "run")
    assert found["halves"] == pytest.approx(found["whole"], rel=1e-5)
    assert found["unequal"] != pytest.approx(found["whole"], rel=1e-2), "negative control: weights count"
