"""Runs whose teacher is asked about the student's own ids, through the real command, with a fault in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from runs_under_fault import assert_same_result, events, finish, held, losses, newest, start, when
from tiny_runs import records, stillhouse, tiny_run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

GIVEN = {
    "labels": {"kind": "given_ids", "k": 12, "add_teacher_topk": 4},
    "objective": [{"loss": "reverse_kl"}],
    "training": {"steps": 6, "save_every": 2, "micro_batch_tokens": 128},
}


def test_a_killed_run_goes_on_with_the_ids_that_its_student_had_chosen(tmp_path: Path) -> None:
    """The step after a checkpoint is scored on ids of weights that are gone by then."""
    config = tiny_run(tmp_path, {**GIVEN, "runtime": "in_process", "student": {"ranks": 1}})
    run, golden = tmp_path / "run", tmp_path / "golden"
    whole = stillhouse("train", str(config), "--set", f"folder={golden}")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    kl = [record["evaluation/forward_kl"] for record in records(golden, "evaluation")]
    assert kl[-1] < 0.9 * kl[0]
    steps = records(golden, "step")
    assert all(0 < record["student/ids_s"] <= record["step/seconds"] for record in steps[:-1])

    process = start(config)
    when(run, lambda: 3 in losses(run), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert max(losses(run)) < 6
    after = stillhouse("train", str(config))
    assert after.returncode == 0, after.stdout + after.stderr
    assert_same_result(run, golden)


def test_two_ranks_at_zero_3_choose_through_ray_and_choose_the_same_after_one_was_killed(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, {**GIVEN, "student": {"zero_stage": 3}})
    run, golden = tmp_path / "run", tmp_path / "golden"
    whole = stillhouse("train", str(config), "--set", f"folder={golden}")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    process = start(config)
    when(run, lambda: 3 in losses(run), process)
    with held(process):
        assert max(losses(run)) < 6
        os.kill(newest(run, "student-1"), signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert len(events(run, "students_lost")) == 1
    assert_same_result(run, golden)
