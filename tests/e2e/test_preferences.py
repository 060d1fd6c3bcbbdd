"""Answers that are compared, with a reference or by their scores, through the real command in one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_runs import chat_row, records, stillhouse, tiny_run, write_rows

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

DPO = {
    "runtime": "in_process",
    "student": {"ranks": 1},
    "labels": "token",
    "objective": [{"loss": "dpo", "beta": 0.5}],
    "optimizer": {"warmup_steps": 0},
    "training": {"steps": 6},
}


def pair(number: int) -> dict:
    """Drops of clear spirit are preferred to lazy dogs, after any prompt."""
    better, worse = ({"role": "assistant", "content": text} for text in ("clear spirit drop by drop", "the lazy dog"))
    return {"prompt": chat_row(number)["prompt"], "chosen": [better], "rejected": [worse]}


def test_a_student_that_begins_as_its_reference_begins_at_log_two_and_learns_to_prefer(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, DPO)
    write_rows(tmp_path / "train.jsonl", [pair(i) for i in range(24)])
    reference = ["--set", f"teacher.model.path={tmp_path / 'student'}"]
    checked = stillhouse("check", str(config), *reference)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    result = stillhouse("train", str(config), *reference)
    assert result.returncode == 0, result.stdout + result.stderr
    first, *_, last = [record["train/dpo"] for record in records(tmp_path / "run", "step")]
    assert first == pytest.approx(math.log(2), abs=1e-3)
    assert last < first - 0.02
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()

    write_rows(tmp_path / "train.jsonl", [chat_row(i) for i in range(24)])
    refused = stillhouse("check", str(config), *reference, "--set", f"folder={tmp_path / 'other'}")
    assert refused.returncode == 3
    assert f"{tmp_path / 'train.jsonl'}:1: is no pair of answers, and the objective compares them" in refused.stdout


def test_a_student_learns_how_candidates_are_ranked_by_a_teacher_and_by_scores(tmp_path: Path) -> None:
    texts = ("clear spirit drop by drop", "the lazy dog", "a large wash")
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    listed = [{"prompt": chat_row(i)["prompt"], "candidates": answers, "scores": [0, 1, 3]} for i in range(24)]
    config = tiny_run(
        tmp_path, DPO | {"objective": [{"loss": "listwise_kl", "temperature": 0.2}], "training": {"steps": 12}}
    )
    write_rows(tmp_path / "train.jsonl", listed)
    scored = ["--set", "objective=[{loss: scored_listwise_kl, temperature: 0.2}]", "--set", "labels=none"]
    for name, changes in (("listwise_kl", []), ("scored_listwise_kl", scored)):
        own = ["--set", f"folder={tmp_path / name}", "--set", "optimizer.learning_rate=1e-3"]
        result = stillhouse("train", str(config), *own, *changes)
        assert result.returncode == 0, result.stdout + result.stderr
        values = [record[f"train/{name}"] for record in records(tmp_path / name, "step")]
        assert min(values) >= 0
        assert sum(values[-3:]) < sum(values[:3]) / 2, (name, values)
