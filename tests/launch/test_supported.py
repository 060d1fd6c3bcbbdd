"""What the schema knows and no run can do yet is one message, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_run
from launch.check import unused
from launch.supported import load_supported
from trainer.errors import ConfigError

ONE = """\
name: x
student: {model: {path: models/student}}
teacher: {name: big, model: {path: models/big}}
prompts: {path: rows.jsonl}
training: {steps: 10}
"""
CASES = {
    "routed answers": (
        [
            "teacher=null",
            "teachers={a: {model: {path: a}, generator: {}}}",
            "route={column: c, map: {x: a}}",
            "answers=teacher",
        ],
        "answers of a teacher that `route` names cannot be written yet",
    ),
    "two ways to write": (
        [
            "teacher.generator={}",
            "tasks={a: {answers: teacher}, b: {answers: {kind: teacher, temperature: 1}}}",
        ],
        "teacher big writes for several tasks",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_run_yet_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "run.yaml").write_text(ONE)
    assert load_supported(tmp_path / "run.yaml").run.name == "x"
    overrides, text = CASES[case]
    with pytest.raises(ConfigError, match=text):
        load_supported(tmp_path / "run.yaml", overrides)


def test_a_teacher_that_nobody_asks_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(ONE)
    assert list(unused(load_run(tmp_path / "run.yaml").run)) == []
    run = load_run(tmp_path / "run.yaml", ["labels=none", "objective=[{loss: cross_entropy}]"]).run
    (finding,) = unused(run)
    assert (finding.status, "no task asks big for labels or answers" in finding.text) == ("warning", True)
