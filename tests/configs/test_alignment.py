"""What `align` can be combined with, and what is refused before a model is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.alignment import Chunks, Overlap, Uld
from configs.errors import ConfigError
from configs.held_out import held_out_sets
from configs.labels import LABELS
from configs.load import dump_run, load_run
from configs.losses import LOSSES
from configs.schema import Run

BASE = """\
name: x
student: {model: {path: models/student}}
teachers: {big: {model: {path: models/big}}, code: {model: {path: models/code}}}
prompts: {path: rows.jsonl}
data: {evaluation: {path: held.jsonl}}
training: {steps: 10}
"""


def load(folder: Path, text: str) -> Run:
    file = folder / "run.yaml"
    file.write_text(BASE + text)
    return load_run(file, []).run


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("align: overlap", Overlap()),
        ("align: {min_ratio: 0.2}\n  labels: hidden", Overlap(min_ratio=0.2)),
        ("align: chunks\n  labels: token\n  objective: [chunk_kl, {loss: cross_entropy, weight: 0.1}]", Chunks()),
        ("align: uld\n  labels: hidden\n  objective: [uld]", Uld()),
        ("align: overlap\n  labels: none\n  objective: [cross_entropy]", Overlap()),
    ],
)
def test_a_task_says_how_its_labels_reach_the_student(tmp_path: Path, text: str, method: object) -> None:
    run = load(tmp_path, f"tasks:\n one:\n  teacher: big\n  {text}\n")
    assert run.resolved_tasks()["one"].align == method
    again = tmp_path / "again.yaml"
    again.write_text(dump_run(run))
    assert load_run(again, []).run == run


def test_what_a_task_does_not_say_comes_from_the_top_level(tmp_path: Path) -> None:
    run = load(
        tmp_path, "align: overlap\ntasks:\n one: {teacher: big}\n two: {teacher: code, align: {min_ratio: 0.9}}\n"
    )
    assert [task.align.min_ratio for task in run.resolved_tasks().values()] == [0.5, 0.9]
    assert [place for place, _, _ in run.choices() if place.endswith("align")] == ["align", "tasks.two.align"]


def test_held_out_rows_of_one_teacher_are_read_twice_where_only_one_task_is_aligned(tmp_path: Path) -> None:
    text = "tasks:\n one: {teacher: big}\n two: {teacher: big, align: overlap}\n"
    text += " three: {teacher: big, align: {min_ratio: 1}}\n"
    assert list(held_out_sets(load(tmp_path, text))) == ["one", "two+three"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("align: gold", "unknown kind 'gold'"),
        ("align: overlap\n  labels: token\n  objective: [cross_entropy]", "align: overlap cannot align labels: token; "
         "write labels: topk or hidden, or align: chunks"),
        ("align: chunks", "align: chunks cannot align labels: topk; write labels: token and objective: "),
        ("align: uld\n  objective: [forward_kl]", "align: uld cannot align labels: topk; write labels: hidden and "),
        ("align: uld\n  labels: hidden", "align: uld gives labels that only uld can use; write labels: hidden and "),
        ("align: chunks\n  labels: token\n  objective: [dpo]", "align: chunks gives labels that only chunk_kl can use"),
        ("labels: token\n  objective: [chunk_kl]", "chunk_kl compares chunks of two tokenisations: write align: "),
        ("align: overlap\n  objective: [chunk_kl]", "chunk_kl compares chunks of two tokenisations: write align: "),
        ("align: overlap\n  labels: hidden\n  objective: [dkd]", "dkd looks at single tokens of the teacher"),
        ("align: {kind: overlap, min_ratio: 2}", "min_ratio"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_give_is_refused_with_what_to_write(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s).*") as refused:
        load(tmp_path, f"tasks:\n one:\n  teacher: big\n  {text}\n")
    assert problem in str(refused.value)


HOWS = {
    "align: overlap": "the ids that labels: topk keep are of unlike vocabularies, and are not joined: write labels: "
    "hidden, or how: per_teacher",
    "align: overlap\n  labels: hidden": None,
    "align: overlap\n  how: per_teacher": None,
    "align: overlap\n  how: per_teacher\n  labels: {control_ids: auto}": "control_ids are ids of one teacher's "
    "vocabulary, and an ensemble with align has several: remove them",
    "align: overlap\n  labels: hidden\n  how: logit_mean": "renormalised over one vocabulary, and align compares "
    "several: write how: probability_mean, or per_teacher",
    "align: overlap\n  how: min_ce": "their tokenizers cut the text into others: write how: per_teacher",
    "align: chunks\n  labels: token\n  objective: [chunk_kl]\n  how: per_teacher": "cuts the text by one teacher's "
    "tokenizer, and an ensemble has several: give each a task of its own, or write align: overlap",
    "align: uld\n  labels: hidden\n  objective: [uld]": "gives probabilities without tokens, which do not mix: write "
    "how: per_teacher",
    "align: uld\n  labels: hidden\n  objective: [uld]\n  how: per_teacher": None,
}


@pytest.mark.parametrize(("text", "problem"), HOWS.items())
def test_what_several_teachers_with_tokenizers_of_their_own_can_become(
    tmp_path: Path, text: str, problem: str | None
) -> None:
    lines = [line for line in text.split("\n") if "how:" not in line]
    how = next((line.strip() for line in text.split("\n") if "how:" in line), "how: probability_mean")
    text = "\n".join([*lines, f"  ensemble: {{teachers: [big, code], {how}}}"])
    if problem is None:
        assert load(tmp_path, f"tasks:\n one:\n  {text}\n").resolved_tasks()["one"].align is not None
        return
    with pytest.raises(ConfigError, match=r"(?s).*") as refused:
        load(tmp_path, f"tasks:\n one:\n  {text}\n")
    assert problem in str(refused.value)


def test_a_route_to_several_tokenizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="align fits one teacher's tokenizer: give each teacher a task of its own"):
        load(tmp_path, "align: overlap\nroute: {column: who, map: {a: big, b: code}}\n")


def test_chunks_are_a_bound_only_of_probabilities_as_they_are() -> None:
    claims = [
        LOSSES.validate({"loss": "chunk_kl", "temperature": temperature}).exactness_of(LABELS.validate("token"))
        for temperature in (1, 100)
    ]
    assert claims == ["lower_bound", "biased"]
