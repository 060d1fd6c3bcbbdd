"""Runs whose student writes the text that it is trained on, through the real command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import merged, records, stillhouse, tiny_run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

WRITES: dict[str, Any] = {
    "answers": {"kind": "student", "max_new_tokens": 24, "n": 2},
    "rollouts": {"engine": {"kind": "hf"}, "dtype": "float32", "bucket_bytes": 40_000},
    "training": {"steps": 6, "sequences_per_step": 4, "save_every": 2, "micro_batch_tokens": 512, "depth": 0},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
}
ALONE = {"runtime": "in_process", "student": {"ranks": 1}}


def trained(tmp_path: Path, changes: dict[str, Any]) -> Path:
    config = tiny_run(tmp_path, merged(WRITES, changes))
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    return tmp_path / "run"


def test_a_student_learns_on_its_own_text_and_every_step_says_how_old_it_is(tmp_path: Path) -> None:
    run = trained(tmp_path, ALONE)
    kl = [record["evaluation/forward_kl"] for record in records(run, "evaluation")]
    assert kl[-1] < 0.95 * kl[0]
    steps = records(run, "step")
    assert [step["rollout/staleness_max"] for step in steps] == [0.0] * 6
    assert all(step["sync/probe_gap"] < 1e-4 for step in steps)
    assert all(step["answers/written"] == 8 for step in steps)
