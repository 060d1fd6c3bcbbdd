"""Whole runs log no name that the contract lacks, and the contract has no name that nothing logs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_folder
from tiny_runs import chat_row, records, run_of, stillhouse, tiny_run, write_rows

from trainer.metric_names import METRICS, metric_of

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]
IN_ONE_PROCESS = {"runtime": "in_process", "student": {"ranks": 1}, "training": {"steps": 6}}
TOGETHER = {"teachers": ["prose", "code"], "how": "per_teacher"}
WEIGHTS = ["entropy", "confidence", "difficulty", {"kind": "position", "half_life": 8}]
NO_NUMBERS = {"time", "kind", "step", "non_finite"}


def of_several_tasks(folder: Path) -> Path:
    """Two teachers and seven tasks: of one the answers are written, of one aligned by their bytes, of one the student
    chooses the ids, and one asks both teachers together."""
    folder.mkdir(parents=True)
    tiny_folder(folder / "code", seed=3)
    asked = write_rows(folder / "asked.jsonl", [{"prompt": chat_row(i)["prompt"]} for i in range(8)])
    digits = write_rows(folder / "digits.jsonl", [{"prompt": f"count to {i}", "completion": "1 2 3"} for i in range(8)])
    engine = {"engine": {"kind": "hf"}, "dtype": "float32"}
    teachers = {
        "prose": {"model": {"path": str(folder / "teacher")}, "scorer": engine, "generator": engine},
        "code": {"model": {"path": str(folder / "code")}, "scorer": engine},
    }
    answers = {"kind": "teacher", "max_new_tokens": 8}
    tasks = {
        "chat": {"teacher": "prose", "prompts": {"path": str(asked)}, "answers": answers},
        "digits": {"teacher": "prose", "prompts": {"path": str(digits)}, "align": "overlap"},
        "chosen": {
            "teacher": "code",
            "labels": {"kind": "given_ids", "k": 8},
            "objective": [{"loss": "reverse_kl"}],
        },
        "code": {
            "teacher": "code",
            "labels": "hidden",
            "objective": [{"loss": "reverse_kl", "token_weights": WEIGHTS}],
        },
        "likeliest": {"teacher": "code", "labels": {"kind": "nucleus", "p": 0.8, "k_max": 16}},
        "drawn": {"teacher": "code", "labels": {"kind": "sampled", "draws": 8}},
        "both": {"ensemble": TOGETHER},
    }
    return run_of(folder, {**IN_ONE_PROCESS, "teachers": teachers, "tasks": tasks})


def of_an_ensemble(folder: Path) -> Path:
    """One task, which asks two teachers together."""
    folder.mkdir(parents=True)
    tiny_folder(folder / "code", seed=3)
    paths = {"prose": folder / "teacher", "code": folder / "code"}
    engine = {"engine": {"kind": "hf"}, "dtype": "float32"}
    teachers = {name: {"model": {"path": str(path)}, "scorer": engine} for name, path in paths.items()}
    return run_of(folder, {**IN_ONE_PROCESS, "teachers": teachers, "ensemble": TOGETHER})


def of_its_own_text(folder: Path) -> Path:
    """The student writes."""
    answers = {"kind": "student", "max_new_tokens": 8}
    return tiny_run(folder, {**IN_ONE_PROCESS, "answers": answers, "rollouts": {"engine": "hf", "dtype": "float32"}})


def names_of(config: Path, kind: str) -> set[str]:
    return {name for record in records(config.parent / "run", kind) for name in record} - NO_NUMBERS


def test_runs_and_the_contract_have_the_same_names(tmp_path: Path) -> None:
    of_one_task = tiny_run(
        tmp_path / "one",
        {
            **IN_ONE_PROCESS,
            "objective": [{"loss": "forward_kl"}, {"loss": "taid"}],
            "store": {"path": str(tmp_path / "labels")},
        },
    )
    several, together = of_several_tasks(tmp_path / "several"), of_an_ensemble(tmp_path / "together")
    configs = (of_one_task, several, together, of_its_own_text(tmp_path / "own"))
    for config in configs:
        result = stillhouse("train", str(config))
        assert result.returncode == 0, result.stdout + result.stderr
    logged = {kind: set().union(*(names_of(config, kind) for config in configs)) for kind in ("step", "evaluation")}
    for kind, names in logged.items():
        found = {name: metric_of(name) for name in names}
        assert {name for name, metric in found.items() if metric is None or metric.kind != kind} == set()
        families = {metric.name for metric in found.values() if metric is not None}
        assert families == {metric.name for metric in METRICS if metric.kind == kind}
