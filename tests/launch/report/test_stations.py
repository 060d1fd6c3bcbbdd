"""The line of the report that says what is learnt of which labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from configs.load import dump_run
from configs.schema import Run
from launch.report.page import write_report
from launch.report.stations import stations
from trainer.run_folder import RunFolder

BASE = {
    "name": "small-one",
    "student": {"model": {"path": "a/student"}},
    "prompts": {"path": "rows.jsonl"},
    "training": {"steps": 100},
}


def said(**changes: Any) -> list[str]:
    """Of a configuration as a run folder holds it."""
    teacher = {} if "teachers" in changes else {"teacher": {"model": {"path": "a/teacher"}}}
    text = dump_run(Run.model_validate({**BASE, **teacher, **changes}))
    return stations(YAML(typ="safe").load(text))


def test_labels_and_objective_are_one_line_with_what_was_chosen() -> None:
    assert said() == ["labels: topk (k 64); objective: forward_kl"]
    terms = [{"loss": "jsd", "beta": 0.5, "weight": 0.9}, {"loss": "cross_entropy", "weight": 0.1}]
    labels = {"kind": "nucleus", "p": 0.9, "temperature": 2, "control_ids": ["<|im_end|>"]}
    assert said(labels=labels, objective=terms) == [
        "labels: nucleus (temperature 2.0, control_ids <|im_end|>, p 0.9, k_max 256); "
        "objective: 0.9 jsd (beta 0.5) + 0.1 cross_entropy"
    ]
    weighted = {"loss": "forward_kl", "token_weights": ["confidence", {"kind": "entropy", "width": 0}]}
    (line,) = said(labels="hidden", objective=[weighted])
    assert "forward_kl of tokens weighted by confidence (power 1.0, favour sure) and " in line
    assert line.endswith("and entropy (at 1.0, width 0.0, favour high)")


def test_each_task_has_its_line_and_several_teachers_their_names() -> None:
    teachers = {name: {"model": {"path": f"a/{name}"}} for name in ("big", "code")}
    ensemble = {"teachers": ["big", "code"], "how": "probability_mean"}
    tasks = {"chat": {"ensemble": ensemble}, "code": {"teacher": "code", "labels": "hidden", "objective": ["tvd"]}}
    assert said(teachers=teachers, tasks=tasks) == [
        "chat: labels: topk (k 64); ensemble: probability_mean of big and code; objective: forward_kl",
        "code: labels: hidden (dtype auto); objective: tvd",
    ]


@pytest.mark.parametrize(
    "config", ["{}", "labels: 3", "objective: {a: 1}", "tasks: [1]", "tasks: {a: 1}", "ensemble: x"]
)
def test_a_configuration_of_another_shape_says_nothing(config: str) -> None:
    assert stations(YAML(typ="safe").load(config)) == []


def test_it_stands_in_the_report(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    teacher = {"model": {"path": "a/teacher"}}
    folder.config.write_text(dump_run(Run.model_validate({**BASE, "teacher": teacher})))
    assert '<p class="lead">labels: topk (k 64); objective: forward_kl</p>' in write_report(folder).read_text()
