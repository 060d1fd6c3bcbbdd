"""`launch.api` as a notebook uses it: real runs in their own process, without Ray; with it in `e2e/test_api.py`."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from ruamel.yaml import YAML
from student_runs import IDS
from tiny_runs import records, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import load_run as load_config
from launch import api
from launch.api_process import run_command
from trainer.run_folder import RunFolder, write_text

IN_PROCESS = {"runtime": "in_process", "student": {"ranks": 1, "zero_stage": 1}, "training": {"steps": 4}}


class Lines:
    """A log that is kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, api.RunResult, list[str]]:
    """Configuration, result and lines of one run."""
    config = tiny_run(tmp_path_factory.mktemp("api"), IN_PROCESS)
    log = Lines()
    return config, api.distil(config, {"training.steps": 3}, log=log), log.lines


def as_mapping(config: Path) -> dict:
    return YAML(typ="safe").load(config.read_text())


def test_importing_the_api_imports_nothing_heavy() -> None:
    code = "import sys, launch.api; print({'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_run_gives_its_numbers_its_answers_and_its_lines(made: tuple[Path, api.RunResult, list[str]]) -> None:
    _, result, lines = made
    assert any(line.startswith("step 3/3") for line in lines)
    assert not any(line.endswith("\n") for line in lines)
    logged = records(result.folder, "step")
    assert list(result.steps.index) == [1, 2, 3]
    assert list(result.steps["train/loss"]) == [record["train/loss"] for record in logged]
    measured = records(result.folder, "evaluation")
    assert list(result.evaluations["forward_kl"]) == [record["evaluation/forward_kl"] for record in measured]
    assert result.evaluations.index.name == "step"
    assert isinstance(result.evaluations, pandas.DataFrame)
    assert len(result.generations["after"]) == len(result.generations["prompts"]) == 1
    assert result.report.stat().st_size > 10_000
    assert result.ending is not None
    assert result.ending.code == 0
    assert result.config.training.steps == 3
    assert repr(api.load_run(str(result.folder))) == repr(result)
    assert "3 steps, held-out KL " in repr(result)


def test_the_student_answers_as_transformers_decodes_greedily(made: tuple[Path, api.RunResult, list[str]]) -> None:
    _, result, _ = made
    model = AutoModelForCausalLM.from_pretrained(result.student_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.student_folder)
    turns = [{"role": "user", "content": "the quick brown fox"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert result.generate(["the quick brown fox", turns], max_new_tokens=6) == [expected, expected]
    with pytest.raises(TypeError, match=r"write generate\(\[prompt\]\)"):
        result.generate("the quick brown fox")


def test_the_page_of_a_notebook_is_the_report_in_a_frame(made: tuple[Path, api.RunResult, list[str]]) -> None:
    html = made[1]._repr_html_()
    assert 'sandbox="allow-scripts"' in html
    assert html.count("<iframe") == 1
    assert "<script" not in html  # escaped: it is the frame's own
    assert "&lt;script" in html


def test_the_same_call_again_gives_the_finished_run(made: tuple[Path, api.RunResult, list[str]]) -> None:
    """From a mapping, and inside a running event loop, as every cell of a notebook is."""
    config, result, _ = made
    log = Lines()

    async def cell() -> api.RunResult:
        return api.distil(as_mapping(config), {"training.steps": 3}, log=log)

    before = (result.folder / "metrics.jsonl").read_bytes()
    assert asyncio.run(cell()).folder == result.folder
    assert any("is finished: 3 steps" in line for line in log.lines)
    assert (result.folder / "metrics.jsonl").read_bytes() == before


def test_a_run_may_be_checked_first_from_a_file_a_mapping_or_a_run(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, IN_PROCESS)
    log = Lines()
    api.check(load_config(config).run, log=log)
    assert any(line.startswith("ok ") and "student model" in line for line in log.lines)
    assert log.lines[0].split() == ["ok", "configuration:", "config,", "run", "tiny"]
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"prompt": 5}\n')
    with pytest.raises(
        api.DataError, match=r"^train rows: config: prompts: 1 of 1 rows .*\n(.*\n)* .*train\.jsonl:1: completion"
    ):
        api.check(as_mapping(config), log=log)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainin": {}}, "config: trainin"),
        ({"training": {"steps": -1}}, "config: training.steps = -1"),
        ({"folder": object()}, "is of type object. A configuration is made of texts"),
        ({"seed": float("nan")}, "config: Out of range float values"),
    ],
)
def test_a_wrong_configuration_is_an_exception_at_once(tmp_path: Path, change: dict, said: str) -> None:
    config = as_mapping(tiny_run(tmp_path, IN_PROCESS)) | change
    with pytest.raises(api.ConfigError) as raised:
        api.distil(config, log=pytest.fail)
    assert said in str(raised.value)
    assert "/stillhouse-" not in str(raised.value)  # no name of a temporary file


def test_an_override_is_named_as_it_is_for_the_command(tmp_path: Path) -> None:
    with pytest.raises(api.ConfigError, match=r"--set training\.stepz=3"):
        api.distil(tiny_run(tmp_path), {"training.stepz": 3}, log=pytest.fail)


def test_an_override_may_be_a_path_and_nothing_that_no_file_could_say(tmp_path: Path) -> None:
    with pytest.raises(api.ConfigError, match=r'--set training\.steps="/nowhere"'):
        api.distil(tiny_run(tmp_path), {"training.steps": Path("/nowhere")}, log=pytest.fail)
    with pytest.raises(api.ConfigError, match="is of type set"):
        api.distil(tiny_run(tmp_path), {"training.steps": {3}}, log=pytest.fail)
    with pytest.raises(api.ConfigError, match=r"overrides are a mapping.*these are 'training\.steps=3'"):
        api.distil(tiny_run(tmp_path), "training.steps=3", log=pytest.fail)


def test_an_adapter_answers_on_its_base(adapted: tuple[RunFolder, torch.Tensor]) -> None:
    folder, expected = adapted
    result = api.load_run(folder.path)
    model, _ = result.student()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    assert len(result.generate(["the quick brown fox"], max_new_tokens=2)) == 1


def test_a_run_that_cannot_start_raises_what_the_command_would_say(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, IN_PROCESS)
    (tmp_path / "student" / "model.safetensors").unlink()
    with pytest.raises(api.ConfigError, match=r"the run cannot start:\n.*has no model\.safetensors"):
        api.distil(config, log=lambda line: None)


def test_a_log_that_fails_ends_the_command(tmp_path: Path) -> None:
    class Full(Exception):
        pass

    def full(line: str) -> None:
        raise Full(line)

    with pytest.raises(Full, match="configuration"):
        api.check(tiny_run(tmp_path, IN_PROCESS), log=full)


def test_an_end_that_nobody_expected_is_told_with_the_last_lines() -> None:
    log = Lines()
    with pytest.raises(api.ConfigError, match="No such command 'brew'"):
        run_command(["brew"], log=log)
    assert log.lines


def test_a_folder_without_a_run_or_a_student_says_so(tmp_path: Path) -> None:
    with pytest.raises(api.ConfigError, match=r"is no run folder: .* there is no such folder"):
        api.load_run(tmp_path / "nowhere")
    write_text(tmp_path / "config.yaml", json.dumps({}))
    result = api.load_run(tmp_path)
    assert result.ending is None
    assert result.steps.empty
    assert result.evaluations.empty
    with pytest.raises(api.ConfigError, match="holds no student yet"):
        result.student()


def test_a_damaged_folder_says_what_is_missing(made: tuple[Path, api.RunResult, list[str]], tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(made[1].folder, tmp_path / "copy"))
    lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("\n".join(["not JSON", *lines[1:]]) + "\n")
    folder.generations.write_text("{")
    result = api.load_run(folder.path)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:1: .*; this line is left out"):
        assert not result.steps.empty
    with pytest.warns(UserWarning, match=r"generations\.json:1: .*; it is left out"):
        assert result.generations == {}
    folder.metrics.unlink()
    with pytest.warns(UserWarning, match=r"copy has no metrics\.jsonl: its steps and evaluations are empty"):
        assert api.load_run(folder.path).steps.empty


def test_export_is_the_command(made: tuple[Path, api.RunResult, list[str]], tmp_path: Path) -> None:
    folder = made[1].export(tmp_path / "small", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", torch.bfloat16])
def test_a_dtype_that_export_does_not_write_is_refused_with_those_it_does(tmp_path: Path, dtype: object) -> None:
    write_text(tmp_path / "config.yaml", json.dumps({}))
    with pytest.raises(api.ConfigError, match=r"there is no dtype .*; write one of bfloat16, float16, float32"):
        api.load_run(tmp_path).export(tmp_path / "out", dtype=dtype)
