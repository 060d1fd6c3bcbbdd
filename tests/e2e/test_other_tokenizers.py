"""Whole runs between models with different tokenizers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import chat_row, records, stillhouse, write_rows
from transformers import AutoTokenizer
from two_tokenizers import METHODS, run_across

from benchmarks.other_student import make_other_student
from launch.prepare import prepare
from trainer.metric_names import metric_of

CHECKOUT = Path(__file__).parents[2]
TEACHER = CHECKOUT / ".cache/models/smollm2-135m-instruct"
ROWS = CHECKOUT / "configs/data"

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


def trained(folder: Path, changes: dict[str, Any]) -> tuple[str, list[dict], list[dict]]:
    """(what was said, steps, evaluations) of a run."""
    config = run_across(folder, changes)
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, records(folder / "run", "step"), records(folder / "run", "evaluation")


@pytest.mark.parametrize("method", ["overlap-hidden", "chunks"])
def test_a_student_learns_from_a_teacher_with_another_tokenizer(tmp_path: Path, method: str) -> None:
    """In one process; the teacher writes some answers."""
    changes = {
        **METHODS[method],
        "teacher": {"generator": {"engine": {"kind": "hf"}, "dtype": "float32"}},
        "answers": {"kind": "teacher", "max_new_tokens": 12, "temperature": 0.7, "max_dropped_fraction": 1.0},
        "training": {"steps": 12},
    }
    config = run_across(tmp_path, changes)
    write_rows(tmp_path / "train.jsonl", [chat_row(i, answered=i % 4 != 0) for i in range(40)])
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    steps, evaluations = records(tmp_path / "run", "step"), records(tmp_path / "run", "evaluation")
    assert "tokens that end an answer: <|im_end|> is </s>" in result.stdout
    assert "nats/aligned token" in result.stdout
    first, last = evaluations[0], evaluations[-1]
    assert 0 < first["evaluation/aligned_rows"] <= first["evaluation/num_rows"]
    assert "evaluation/teacher_perplexity" not in first
    if method == "overlap-hidden":
        assert last["evaluation/forward_kl"] < 0.9 * first["evaluation/forward_kl"]
    else:
        assert sum(s["train/chunk_kl"] for s in steps[-3:]) < 0.9 * sum(s["train/chunk_kl"] for s in steps[:3])
        assert all(step["align/byte_ratio"] > 0.95 for step in steps)
    assert all(metric_of(name) for record in (*steps, *evaluations) for name in record if "/" in name)
    exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert exported.eos_token == "</s>"
    assert exported.chat_template.startswith("{% for m in messages %}{{ '['")
    shown = json.loads((tmp_path / "run" / "generations.json").read_text())
    assert set(shown) >= {"before", "after", "teacher", "reference"}
    for text in json.loads((tmp_path / "run" / "trained.json").read_text())["sequences"]:
        assert text["how"] == method.partition("-")[0]
        reached = [row for row in text["rows"] if row["kept"] != 0]
        assert reached
        assert all(row["beside"] for row in reached)
        assert all(bool(row["ids"]) == (text["how"] == "overlap") for row in reached)


def test_on_ray_with_vllm_the_engine_has_the_teachers_vocabulary_and_the_ranks_the_students(tmp_path: Path) -> None:
    changes = {
        **METHODS["overlap"],
        "runtime": "ray",
        "student": {"ranks": 2},
        "teacher": {"scorer": {"engine": {"kind": "vllm", "kv_cache_bytes": 32 * 2**20}}},
        "training": {"steps": 3},
    }
    said, steps, evaluations = trained(tmp_path, changes)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert evaluations[-1]["evaluation/forward_kl"] < evaluations[0]["evaluation/forward_kl"]
    assert "topk labels against hidden" in said, said


def test_too_little_in_common_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = run_across(tmp_path, METHODS["overlap"] | {"align": {"kind": "overlap", "min_ratio": 0.9}})
    result = stillhouse("check", str(config))
    assert result.returncode == 3, result.stdout + result.stderr
    said = " ".join((result.stdout + result.stderr).split())
    assert "of the answers of task main are aligned with the teacher's tokens, and align.min_ratio is 0.9" in said


def with_long_numbers(file: Path) -> list[dict[str, Any]]:
    """Rows whose answer has numbers, and none of a single digit, which is a token of both sides."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = [re.findall(r"\d+", row["completion"][0]["content"]) if row["completion"] else [] for row in rows]
    return [row for row, numbers in zip(rows, found, strict=True) if numbers and min(map(len, numbers)) > 1]


@pytest.mark.long
def test_a_real_teacher_teaches_a_student_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    prepare("smollm2-135m-instruct", TEACHER)
    make_other_student(tmp_path / "student", ROWS / "demo_train.jsonl", vocabulary=4096, layers=2, width=128)
    config = run_across(tmp_path / "tiny", METHODS["overlap-hidden"])
    settings = {
        "folder": tmp_path / "run",
        "teacher.model.path": TEACHER,
        "student.model.path": tmp_path / "student",
        "prompts.path": write_rows(tmp_path / "rows.jsonl", with_long_numbers(ROWS / "demo_train.jsonl")),
        "data.evaluation": f"{{path: {ROWS / 'demo_eval.jsonl'}, max_rows: 6}}",
        "data.max_length": 256,
        "training.steps": 12,
    }
    given = [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]
    result = stillhouse("train", str(config), *given)
    assert result.returncode == 0, result.stdout + result.stderr
    first, last = records(tmp_path / "run", "evaluation")
    assert last["evaluation/forward_kl"] < 0.9 * first["evaluation/forward_kl"]
    steps = records(tmp_path / "run", "step")
    assert min(step["align/byte_ratio"] for step in steps) > 0.6
    digits = [step["align/digit_ratio"] for step in steps if "align/digit_ratio" in step]
    assert sum(digits) / len(digits) < 0.5, "numbers are what only one side has"
