"""Terms on sampled tokens in a real run: the student writes, a function rewards, and the ratio tells that all fits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import merged, records, stillhouse, tiny_run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

WRITES: dict[str, Any] = {
    "runtime": "in_process",
    "student": {"ranks": 1},
    "answers": {"kind": "student", "max_new_tokens": 16, "n": 2},
    "rollouts": {"engine": {"kind": "hf"}, "dtype": "float32"},
    "training": {"steps": 3, "sequences_per_step": 3, "micro_batch_tokens": 256, "depth": 0},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
    "labels": {"kind": "topk", "k": 16},
}
RAISES = {"loss": "policy_gradient", "discount": 0.9, "reward_weight": 0.5, "baseline": "group", "whiten": "reward"}


def test_strict_steps_have_ratios_of_one_and_learn(tmp_path: Path) -> None:
    own = {"objective": [RAISES, {"loss": "k2"}], "reward": {"kind": "pattern", "pattern": "e"}}
    result = stillhouse("train", str(tiny_run(tmp_path, merged(WRITES, own))))
    assert result.returncode == 0, result.stdout + result.stderr
    steps = records(tmp_path / "run", "step")
    assert len(steps) == 3
    for step in steps:
        for loss in ("policy_gradient", "k2"):
            assert math.isfinite(step[f"train/{loss}"])
            assert step[f"train/{loss}_ratio"] == pytest.approx(1.0, abs=2e-3), "text, rows and weights fit together"
            assert step[f"train/{loss}_truncated"] == 0
        assert step["train/grad_norm"] > 0
        assert step["train/skipped"] == 0


def test_a_reward_that_is_no_number_ends_the_run_with_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nothing.py").write_text(
        "from configs.rewards import Reward as Parameters\n\n\nclass Reward(Parameters):\n"
        "    def score(self, answers):\n        return [float('nan')] * len(answers)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = {"objective": [RAISES], "reward": "house.nothing"}
    result = stillhouse("train", str(tiny_run(tmp_path, merged(WRITES, own))))
    assert result.returncode == 3, result.stdout + result.stderr
    assert "reward: house.nothing gave nan to answer 0" in result.stderr
    assert ".jsonl:" in result.stderr
