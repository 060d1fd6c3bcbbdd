"""Control tokens of labels: names and ids as the teacher's tokenizer has them, and one error where it has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_run
from two_tokenizers import METHODS, run_across

from configs.labels import LABELS
from configs.load import LoadedRun, load_run
from configs.schema import Run
from configs.tasks import Task
from launch.check import models
from trainer.errors import ConfigError
from trainer.loop.control_ids import with_control_ids
from trainer.loop.inputs import Inputs, read_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("control")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedRun:
    return load_run(tiny_run(folder), [])


@pytest.fixture(scope="module")
def inputs(loaded: LoadedRun) -> Inputs:
    return read_inputs(loaded.run)


def run_with(loaded: LoadedRun, **labels: Any) -> Run:
    return loaded.run.model_copy(update={"labels": LABELS.validate(labels)})


def test_names_are_of_the_teachers_tokenizer_where_the_student_has_another(tmp_path: Path) -> None:
    run = load_run(run_across(tmp_path, METHODS["overlap"]), []).run
    inputs = read_inputs(run)
    assert inputs.tokenizer.convert_ids_to_tokens(2) != "<|im_end|>"
    for given in ("auto", ["<|im_end|>"]):
        labels = LABELS.validate({"kind": "topk", "control_ids": given})
        assert with_control_ids(run.model_copy(update={"labels": labels}), inputs).labels.control_ids == (2,)
    labels = LABELS.validate({"kind": "topk", "control_ids": ["</s>"]})
    with pytest.raises(ConfigError, match="'</s>' is no single token of the teacher's tokenizer"):
        with_control_ids(run.model_copy(update={"labels": labels}), inputs)


@pytest.mark.parametrize(
    ("given", "ids"),
    [("auto", (2,)), (["<|im_end|>", "<|im_start|>"], (2, 1)), ([7, "<|im_end|>", 2], (7, 2)), ([], ())],
)
@pytest.mark.parametrize("kind", ["topk", "nucleus", "sampled"])
def test_names_become_ids_of_the_teachers_tokenizer(
    loaded: LoadedRun, inputs: Inputs, kind: str, given: Any, ids: tuple[int, ...]
) -> None:
    assert with_control_ids(run_with(loaded, kind=kind, control_ids=given), inputs).labels.control_ids == ids


def test_each_task_has_its_own(loaded: LoadedRun, inputs: Inputs) -> None:
    tasks = {"a": Task(labels=LABELS.validate({"kind": "nucleus", "control_ids": ["<pad>"]})), "b": Task()}
    made = with_control_ids(loaded.run.model_copy(update={"tasks": tasks}), inputs).resolved_tasks()
    assert made["a"].labels.control_ids == (0,)
    assert made["b"].labels == loaded.run.labels


def test_a_run_that_names_none_is_the_same_run(loaded: LoadedRun, inputs: Inputs) -> None:
    assert with_control_ids(loaded.run, inputs) is loaded.run


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["<|im_ent|>"], r"<\|im_ent\|>' is no single token .*did you mean '<\|im_end\|>'"),
        ([283], "id 283 is outside the vocabulary of 283; write one of 0 to 282"),
        ([1, 2, 3], "3 ids do not fit into k: 2; write k: 3 or more"),
    ],
)
def test_what_is_no_control_token_is_one_problem_of_check_at_its_line(
    loaded: LoadedRun, inputs: Inputs, given: Any, text: str
) -> None:
    (problem,) = models.label_bytes(run_with(loaded, k=2, control_ids=given), inputs, [])
    assert problem.fatal
    with pytest.raises(ConfigError, match=rf"run.yaml:\d+.*labels.control_ids.*{text}"):
        raise ConfigError(loaded.located(problem.message))


@pytest.mark.parametrize("given", ["im_end", [-1], [True], [1.5], ["a", "a"]])
def test_what_is_no_list_of_tokens_is_refused_when_the_file_is_read(folder: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"1 problem\n.*labels.control_ids"):
        load_run(tiny_run(folder, {"labels": {"kind": "topk", "k": 16, "control_ids": given}}), [])


def test_check_says_which_tokens_are_kept(loaded: LoadedRun, inputs: Inputs) -> None:
    kept, size = models.label_bytes(run_with(loaded, kind="sampled", control_ids="auto"), inputs, [])
    assert kept.text == "labels.control_ids: <|im_end|> (2)"
    assert size.text.startswith("sampled: at most ")
