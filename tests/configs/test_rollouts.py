"""Rollouts in a configuration: what holds together, and what a user is told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_run

BASE = """\
name: a
student: {model: {path: owner/small}}
teacher: {model: {path: owner/big}}
prompts: {path: rows.jsonl}
training: {steps: 10}
"""


def loaded(tmp_path: Path, text: str):
    file = tmp_path / "run.yaml"
    file.write_text(BASE + text)
    return load_run(file, []).run


def test_the_student_writes_from_its_own_distribution_unless_told_otherwise(tmp_path: Path) -> None:
    run = loaded(tmp_path, "answers: student\nrollouts: {}\n")
    assert run.answers.draws_otherwise == ""
    assert (run.answers.temperature, run.answers.top_p, run.answers.n, run.rollouts.sync_every) == (1.0, 1.0, 1, 1)
    other = loaded(tmp_path, "answers: {kind: student, n: 4, temperature: 0.7}\nrollouts: {replicas: 2}\n")
    assert other.answers.draws_otherwise == "temperature: 0.7"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rollouts: {}\n", "no task lets the student write: remove rollouts, or write answers: student"),
        ("answers: student\n", "answers: student are written by engines that hold the student: add rollouts"),
        ("answers: student\nrollout: {}\n", "unknown key 'rollout'; did you mean 'rollouts'?"),
        ("answers: studnet\nrollouts: {}\n", "did you mean 'student'?"),
        ("answers: {kind: student, num_samples: 4}\nrollouts: {}\n", "unknown key 'num_samples'; did you mean 'n'?"),
        ("answers: {kind: student, n: 2, temperature: 0}\nrollouts: {}\n", "greedy answers are all the same"),
        ("answers: student\nrollouts: {sync_every: 0}\n", "rollouts.sync_every"),
        ("answers: student\nrollouts: {tensor_parallel_size: 2}\n", "write tensor_parallel_size: 1 and more replicas"),
        ("answers: student\nrollouts: {}\nalign: overlap\n", "a teacher with another tokenizer reads no text of the"),
        ("answers: student\nrollouts: {}\nruntime: in_process\n", "rollouts.engine = 'vllm'"),
        ("answers: student\nrollouts: {}\nstore: {path: x, mode: only}\n", "holds no labels of text that is yet to be"),
    ],
)
def test_what_cannot_be_is_said_with_what_to_write(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        loaded(tmp_path, text)
    assert said in str(refused.value)


def test_a_plain_corpus_has_no_prompts_to_answer(tmp_path: Path) -> None:
    text = "answers: student\nrollouts: {}\n"
    base = BASE.replace("{path: rows.jsonl}", "{path: rows.txt, format: text}")
    (tmp_path / "run.yaml").write_text(base + text)
    with pytest.raises(ConfigError, match="answers: student answers prompts, and format: text has none"):
        load_run(tmp_path / "run.yaml", [])
