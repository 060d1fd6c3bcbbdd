"""What `check` says of teachers that are asked about the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_run
from launch.check.run import ensembles

TEXT = """\
name: x
student: {model: {path: models/student}}
teachers: {big: {model: {path: models/big}}, code: {model: {path: models/code}}}
prompts: {path: rows.jsonl}
ensemble: {teachers: [big, code], weights: {big: 3, code: 1}}
training: {steps: 10}
"""
SAID = {
    "labels=topk": "probability_mean of big, code (big 75.0%, code 25.0%); a lost one ends the run; each reads "
    "every token twice, the second time for the ids that any keeps",
    "labels=hidden": "probability_mean of big, code (big 75.0%, code 25.0%); a lost one ends the run",
    "ensemble={teachers: [big, code], how: min_ce, on_lost: continue}": "min_ce of big, code; a lost one is gone on "
    "without",
    "ensemble={teachers: [big, code], how: per_teacher, weights_column: trust}": "per_teacher of big, code (weights of "
    "the row's trust); a lost one ends the run",
}


@pytest.mark.parametrize(("override", "said"), SAID.items())
def test_the_teachers_and_what_becomes_of_them_are_a_line(tmp_path: Path, override: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    (finding,) = ensembles(load_run(file, [override]).run)
    assert (finding.status, finding.subject, finding.text) == ("ok", "ensemble", said)


def test_one_teacher_is_none(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    assert list(ensembles(load_run(file, ["ensemble=null", "tasks={a: {teacher: big}}"]).run)) == []
