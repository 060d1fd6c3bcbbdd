"""A run of every kind of labels that can be kept, of teachers with two tokenizers, alone and together: once more from
the label store alone, killed and resumed, it learns the same, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from runs_under_fault import DIES_AFTER_STEP_5, assert_same_result, finish, start
from tiny_models import tiny_model
from tiny_runs import records, stillhouse
from two_tokenizers import digits_in_threes, run_across

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
NAMES = ["own", "other"]
OVERLAP = {"kind": "overlap", "min_ratio": 0.05}
FEATURES = {"loss": "features", "distance": "l2", "student_layer": 1, "teacher_layer": 1, "projector": "linear"}
TASKS: dict[str, Any] = {
    "drawn": {"teacher": "own", "labels": {"kind": "sampled", "draws": 20}},
    "ragged": {"teacher": "own", "labels": {"kind": "nucleus", "k_max": 24}},
    "states": {
        "teacher": "own",
        "labels": {"kind": "hidden", "layers": [1]},
        "objective": [{"loss": "forward_kl"}, FEATURES],
    },
    "chunks": {
        "teacher": "other",
        "align": "chunks",
        "labels": {"kind": "token"},
        "objective": [{"loss": "chunk_kl"}],
    },
    "mixed": {
        "align": OVERLAP,
        "labels": {"kind": "hidden"},
        "ensemble": {"teachers": NAMES, "weights": {"own": 1, "other": 3}},
    },
    "each": {
        "align": OVERLAP,
        "labels": {"kind": "topk", "k": 16},
        "ensemble": {"teachers": NAMES, "how": "per_teacher"},
        "objective": [{"loss": "forward_kl"}, {"loss": "cross_entropy", "weight": 0.1}],
    },
}
"""By the student's own tokenizer, or by the one of a teacher that has another."""


def config_of(folder: Path) -> Path:
    """Of a run in one process, from a store alone."""
    config = run_across(folder, {"training": {"steps": 7, "sequences_per_step": 12, "save_every": 2}})
    tiny_model(seed=3, vocab_size=448, hidden_size=96).save_pretrained(folder / "own")
    digits_in_threes().save_pretrained(folder / "own")
    yaml = YAML(typ="safe")
    run = yaml.load(config.read_text())
    del run["teacher"], run["labels"], run["objective"]
    run["teachers"] = {
        name: {"model": {"path": str(folder / path)}, "scorer": {"engine": {"kind": "hf"}, "dtype": "float32"}}
        for name, path in zip(NAMES, ("own", "teacher"), strict=True)
    }
    run |= {"tasks": TASKS, "store": {"path": str(folder / "labels"), "mode": "only"}}
    with config.open("w") as file:
        yaml.dump(run, file)
    return config


def test_every_kind_of_labels_comes_out_of_the_store_as_it_went_in_and_survives_a_kill(tmp_path: Path) -> None:
    """The run that fills the store is not killed; the one that reads it is, and starts no teacher."""
    config, online, run = config_of(tmp_path), tmp_path / "online", tmp_path / "run"
    write = ["--set", "store.mode=read_write", "--set", f"folder={online}", "--skip-self-test"]
    result = stillhouse("train", str(config), *write)
    assert result.returncode == 0, result.stdout + result.stderr
    code, output = finish(start(config, code=DIES_AFTER_STEP_5))
    assert code == -signal.SIGKILL, output
    result = stillhouse("train", str(config), "--skip-self-test")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed after step 4" in result.stdout
    assert_same_result(run, online)
    assert {step["labels/store_misses"] for step in records(run, "step")} == {0}

    for step in records(run, "step"):
        assert 0 < sum(step[f"teacher/{name}/weight"] for name in NAMES) < 1 + 1e-6
        assert all(step[f"task/each/forward_kl/{name}"] > 0 for name in NAMES)
        assert 0 < step["align/row_ratio"] <= 1
    before, after = records(run, "evaluation")
    for task in ("mixed", "each"):
        kl, *each = (f"evaluation/task/{task}/{of}forward_kl" for of in ("", *(f"teacher/{n}/" for n in NAMES)))
        assert after[kl] < before[kl], task
        assert all(after[one] > 0 for one in each)
        assert after[f"evaluation/task/{task}/aligned_rows"] > 0
