"""A run that has ended becomes longer by the same command, through the real command and one process."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs_under_fault import assert_same_result, counted, end_started, losses, notes, start, when
from safetensors.torch import load_file, save_file
from tiny_runs import records, stillhouse, tiny_run

from configs.load import load_run
from trainer.model.optimizer import learning_rate

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

TEN_ROWS = {
    "runtime": "in_process",
    "student": {"ranks": 1},
    "prompts": {"max_rows": 10},
    "training": {"steps": None, "epochs": 1, "sequences_per_step": 4, "save_every": 0},
}


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    end_started()


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


@pytest.mark.parametrize("held_out", [True, False])
def test_a_student_that_its_last_step_breaks_ends_the_run_with_5_and_is_not_exported(
    tmp_path: Path, held_out: bool
) -> None:
    config = tiny_run(tmp_path, {"runtime": "in_process", "student": {"ranks": 1}, "training": {"save_every": 1}})
    run = tmp_path / "run"
    breaks = ["--set", "optimizer={learning_rate: 1e39, schedule: constant}", "--set", "training.steps=1"]
    result = stillhouse("train", str(config), *breaks, *([] if held_out else ["--set", "data.evaluation=null"]))
    assert result.returncode == 5, result.stdout + result.stderr
    assert ("KL after step 1 is" if held_out else "weights hold NaN or infinity") in result.stderr
    assert not (run / "student").exists()


def test_a_student_that_is_broken_before_the_first_step_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, {"runtime": "in_process", "student": {"ranks": 1}})
    file = tmp_path / "student" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    result = stillhouse("train", str(config), "--skip-self-test")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "before the first step" in result.stderr


def test_a_streamed_run_that_is_killed_goes_on_with_the_rows_it_would_have_had(tmp_path: Path) -> None:
    stream = {
        "runtime": "in_process",
        "student": {"ranks": 1},
        "prompts": {"path": str(tmp_path / "part*.jsonl"), "streaming": True},
        "training": {"save_every": 2, "steps": 12},
    }
    config, run, golden = tiny_run(tmp_path, stream), tmp_path / "run", tmp_path / "golden"
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    for number in range(4):
        (tmp_path / f"part{number}.jsonl").write_text("".join(rows[number * 10 : number * 10 + 10]))
    whole = stillhouse("train", str(config), "--set", f"folder={golden}")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert len(losses(golden)) == 12, "96 sequences of 40 rows: the third epoch is begun"

    process = start(config)
    when(run, lambda: 6 in losses(run), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert max(losses(run)) < 12
    after = stillhouse("train", str(config))
    assert after.returncode == 0, after.stdout + after.stderr
    assert_same_result(run, golden)
