"""Runs whose teacher writes the answers, and what becomes of answers that are empty or cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import chat_row, records, stillhouse, tiny_run, write_rows

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


def test_answers_that_are_cut_off_are_learnt_counted_and_told(tmp_path: Path) -> None:
    file = writing_run(tmp_path, end_ids=[2])
    ended = stillhouse("train", str(file))
    assert ended.returncode == 0, ended.stderr
    assert "has answers that the teacher did not end" in ended.stdout
    counters = read_json(tmp_path / "run" / "manifest.json")["counters"]
    assert (counters["answers_written"], counters["answers_dropped"]) == (12, counters["answers_empty"])
    assert counters["answers_cut_off"] > 6
    assert "cut off" in (tmp_path / "run" / "student" / "README.md").read_text()
