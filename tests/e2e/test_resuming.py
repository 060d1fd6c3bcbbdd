"""A run that has ended becomes longer by the same command, through the real command and one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs_under_fault import assert_same_result, counted, losses, notes
from tiny_runs import records, stillhouse, tiny_run

from configs.load import load_run
from trainer.optimizer import learning_rate

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

TEN_ROWS = {
    "runtime": "in_process",
    "student": {"ranks": 1},
    "data": {"train": {"max_rows": 10}},
    "training": {"steps": None, "epochs": 1, "sequences_per_step": 4, "save_every": 0},
}


def sizes(run: Path) -> list[int]:
    return [record["step/sequences"] for record in records(run, "step")]


def test_an_epoch_ends_with_a_short_step_and_one_more_goes_on_from_there_the_same_each_time(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, TEN_ROWS)
    run, other = tmp_path / "run", tmp_path / "other"
    first = stillhouse("train", str(config))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "in float32" in first.stdout.splitlines()[-3]
    assert sizes(run) == [4, 4, 2]
    before = losses(run)
    assert counted(run)["trained_sequences"] == counted(run)["read"] == 10
    shutil.copytree(run, other)

    for folder in (run, other):
        longer = stillhouse("train", str(config), "--set", "training.epochs=2", "--set", f"folder={folder}")
        assert longer.returncode == 0, longer.stdout + longer.stderr
    assert_same_result(run, other)
    assert sizes(run) == [4, 4, 2, 4, 4, 2]
    assert counted(run)["trained_sequences"] == counted(run)["read"] == 20
    assert {step: loss for step, loss in losses(run).items() if step <= 3} == before
    settings = load_run(config).run.optimizer
    rates = [record["train/learning_rate"] for record in records(run, "step")]
    assert rates == [learning_rate(s, settings=settings, total_steps=3 if s <= 3 else 6) for s in range(1, 7)]
    assert any("the run has 6 steps now, it had 3" in text for text in notes(run))
    assert [record["step"] for record in records(run, "evaluation")] == [0, 3, 6]
    assert "step 6 of 6" in (run / "report.html").read_text()

    shorter = stillhouse("train", str(config))
    assert (shorter.returncode, "write at least 2" in shorter.stderr) == (2, True), shorter.stderr
    again = stillhouse("train", str(config), "--set", "training.epochs=2")
    assert (again.returncode, "is finished: 6 steps" in again.stdout) == (0, True), again.stdout + again.stderr
