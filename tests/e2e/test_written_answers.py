"""Runs whose teacher writes the answers, and what becomes of answers that are empty or cut off."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from runs_under_fault import events, finish, held, losses, newest, start, when
from tiny_models import tiny_folder
from tiny_runs import chat_row, records, run_of, stillhouse, tiny_run, write_rows

from trainer.run_folder import read_json

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


def writing_run(folder: Path, *, end_ids: list[int]) -> Path:
    """Three steps of four prompts in one process; the teacher's generation settings name `end_ids`."""
    changes = {
        "runtime": "in_process",
        "student": {"ranks": 1},
        "teacher": {"generator": {"engine": {"kind": "hf"}, "dtype": "float32"}},
        "answers": {"kind": "teacher", "max_new_tokens": 6},
        "optimizer": {"warmup_steps": 1},
        "training": {"steps": 3, "sequences_per_step": 4, "save_every": 1},
        "report": {"generate": 0},
    }
    file = tiny_run(folder, changes)
    write_rows(folder / "train.jsonl", [chat_row(i, answered=False) for i in range(40)])
    (folder / "teacher" / "generation_config.json").write_text(json.dumps({"eos_token_id": end_ids}))
    return file


def test_a_teacher_that_says_nothing_ends_the_run_with_3_and_every_step_without_text_is_told(tmp_path: Path) -> None:
    file = writing_run(tmp_path, end_ids=list(range(283)))
    ended = stillhouse("train", str(file))
    assert ended.returncode == 3, ended.stderr
    assert "12 of the 12 answers that the teacher wrote could not be trained on (12 empty)" in ended.stderr
    assert "step 1 taught nothing" in ended.stdout
    steps = records(tmp_path / "run", "step")
    assert [(step["step/sequences"], step["answers/empty"], step["train/loss"]) for step in steps] == [
        (0, 4.0, None)
    ] * 2
    again = stillhouse("train", str(file))  # resumed after the second step, it knows what was written before
    assert again.returncode == 3
    assert "12 of the 12 answers" in again.stderr


def routed_run(folder: Path, *, engine: object, runtime: str) -> Path:
    """Two teachers write two answers to each of their prompts, for a student of hard labels."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_folder(folder / "small", seed=3)
    changes = {
        "runtime": runtime,
        "student": {"ranks": 1},
        "labels": "none",
        "objective": [{"loss": "cross_entropy"}],
        "teachers": {
            name: {
                "model": {"path": str(folder / path)},
                "generator": {"engine": engine, "dtype": "float32"},
            }
            for name, path in (("big", "teacher"), ("small", "small"))
        },
        "route": {"column": "who", "map": {"a": "big", "b": "small"}},
        "answers": {"kind": "teacher", "n": 2, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 12},
        "data": {"evaluation": None},
        "training": {"steps": 6, "sequences_per_step": 4},
    }
    file = run_of(folder, changes)
    write_rows(folder / "train.jsonl", [chat_row(i, answered=False) | {"who": "ab"[i % 2]} for i in range(40)])
    return file


def test_routed_teachers_write_in_one_process(tmp_path: Path) -> None:
    ended = stillhouse("train", str(routed_run(tmp_path, engine="hf", runtime="in_process")))
    assert ended.returncode == 0, ended.stderr
    assert read_json(tmp_path / "run" / "manifest.json")["counters"]["answers_written"] == 6 * 4 * 2
    for step in records(tmp_path / "run", "step"):
        assert step["answers/written"] == 8
        assert step["step/sequences"] == 8 - step["answers/dropped"]
        assert step.get("teacher/big/tokens", 0) + step.get("teacher/small/tokens", 0) == step["train/tokens"]


def test_a_generator_killed_while_teachers_write_changes_no_word(tmp_path: Path) -> None:
    engine = {"kind": "vllm", "kv_cache_bytes": 32 * 2**20}
    calm = stillhouse("train", str(routed_run(tmp_path / "calm", engine=engine, runtime="ray")))
    assert calm.returncode == 0, calm.stdout + calm.stderr
    process = start(routed_run(tmp_path / "killed", engine=engine, runtime="ray"))
    run = tmp_path / "killed/run"
    when(run, lambda: 1 in losses(run), process)
    with held(process):
        os.kill(newest(run, "small.generator-0"), signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert len(events(run, "teacher_restart")) >= 1
    ours, theirs = records(run, "step"), records(tmp_path / "calm/run", "step")
    for name in ("train/loss", "train/tokens", "teacher/big/tokens", "teacher/small/tokens", "answers/cut_off"):
        assert [step.get(name) for step in ours] == [step.get(name) for step in theirs], name


def test_answers_that_are_cut_off_are_learnt_counted_and_told(tmp_path: Path) -> None:
    file = writing_run(tmp_path, end_ids=[2])
    ended = stillhouse("train", str(file))
    assert ended.returncode == 0, ended.stderr
    assert "has answers that were not ended" in ended.stdout
    counters = read_json(tmp_path / "run" / "manifest.json")["counters"]
    assert (counters["answers_written"], counters["answers_dropped"]) == (12, counters["answers_empty"])
    assert counters["answers_cut_off"] > 6
    assert "cut off" in (tmp_path / "run" / "student" / "README.md").read_text()
