"""`stillhouse export` and `report` on run folders as a run leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from student_runs import IDS, write_run
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from configs.load import load_run
from launch.cli import app
from launch.export import complete_student, export, stored_dtype
from launch.train import closing_words
from trainer.errors import ConfigError
from trainer.run_folder import RunFolder, write_json


def test_a_whole_student_is_exported_with_tokenizer_template_and_card(
    whole: RunFolder, tmp_path: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "deep" / "target"
    export(whole.path, target, merge_adapter=False)
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(target)(IDS).logits
        expected = AutoModelForCausalLM.from_pretrained(tiny_student)(IDS).logits
    assert torch.equal(exported, expected)
    assert AutoTokenizer.from_pretrained(target).chat_template == tiny_tokenizer().chat_template
    card = (target / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "owner/teacher | not stated" in card
    assert f"{target}: model in float32, " in capsys.readouterr().out
    assert "| weights stored in | float32 |" in card
    assert [p.name for p in target.parent.iterdir()] == ["target"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_the_dtype_that_is_told_is_that_of_the_weights(tmp_path: Path) -> None:
    assert stored_dtype(tmp_path) == ""
    save_file({"a": torch.zeros(9, dtype=torch.bfloat16), "b": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    save_file({"c": torch.zeros((), dtype=torch.int64)}, tmp_path / "y.safetensors")
    assert stored_dtype(tmp_path) == "bfloat16 and float32 and i64"
    (tmp_path / "y.safetensors").write_text("no weights")
    with pytest.raises(ConfigError, match=r"cannot read .*y.safetensors"):
        stored_dtype(tmp_path)


def test_the_student_of_an_earlier_end_is_not_exported_as_that_of_a_longer_run(
    whole: RunFolder, tmp_path: Path
) -> None:
    write_json(whole.manifest, {"started": 1.0, "finished": 2.0})
    export(whole.path, tmp_path / "first", merge_adapter=False)
    write_json(whole.manifest, {"started": 3.0})
    with pytest.raises(ConfigError, match=r"not at its end, and .*student is of an earlier one"):
        export(whole.path, tmp_path / "second", merge_adapter=False)


def test_an_adapter_is_exported_as_it_is_or_merged(
    adapted: tuple[RunFolder, torch.Tensor], tmp_path: Path, tiny_student: Path
) -> None:
    folder, expected = adapted
    write_json(folder.manifest, {"finished": 2.0, "data": {"stop_ids": [2, 40]}})
    export(folder.path, tmp_path / "adapter", merge_adapter=False)
    export(folder.path, tmp_path / "merged", merge_adapter=True)
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [2, 40]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "merged").glob("adapter*"))
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_student).eval()
    with torch.no_grad():
        assert torch.allclose(alone(IDS).logits, expected, atol=1e-5)
        assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
        assert not torch.allclose(base(IDS).logits, expected, atol=1e-2)  # the adapter does something
    assert "adapter for" in (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text()


def test_a_target_in_use_is_left_alone(whole: RunFolder, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(whole.path, target, merge_adapter=False)
    assert [p.name for p in target.iterdir()] == ["precious"]
    (target / "precious").unlink()
    export(whole.path, target, merge_adapter=False)


def test_a_student_with_a_missing_weight_is_not_exported(whole: RunFolder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(whole.student / "model.safetensors")
    gone = next(name for name in weights if "mlp" in name)
    save_file(
        {name: value for name, value in weights.items() if name != gone},
        whole.student / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ConfigError, match=f"lacks 1 weights, first {gone}"):
        export(whole.path, tmp_path / "target", merge_adapter=False)
    assert not (tmp_path / "target").exists()
    assert not list(tmp_path.glob(".target*"))


def test_what_cannot_be_exported_says_what_to_do(whole: RunFolder, tmp_path: Path, tiny_student: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        export(tmp_path / "nowhere", tmp_path / "target", merge_adapter=False)
    with pytest.raises(ConfigError, match="whole already"):
        export(whole.path, tmp_path / "target", merge_adapter=True)
    unfinished = write_run(tmp_path / "other", tiny_student)
    with pytest.raises(ConfigError, match="holds no student yet; let the run come to its end: stillhouse train"):
        export(unfinished.path, tmp_path / "target", merge_adapter=False)


def test_report_prints_where_the_page_is(whole: RunFolder) -> None:
    assert CliRunner().invoke(app, ["report", str(whole.path)]).output.strip() == str(whole.report)
    assert "<title>one" in whole.report.read_text()


@pytest.mark.parametrize(("known", "expected"), [(5, [2, 5]), ([2, 5], [2, 5]), (2, 2), (None, 2)])
def test_a_student_stops_where_its_teacher_does_and_where_it_did_itself(
    tmp_path: Path, known: object, expected: object
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": known, "pad_token_id": 0}))
    folder = write_run(tmp_path / "run", tmp_path)
    complete_student(tmp_path, load_run(folder.config).run, stop_ids=(2,))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "eos_token_id": expected,
        "pad_token_id": 0,
    }


def test_an_adapter_names_the_base_that_was_configured_and_not_a_nodes_copy_of_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/scratch/copy", "r": 2}))
    folder = write_run(tmp_path / "run", tmp_path / "base")
    complete_student(tmp_path, load_run(folder.config).run, stop_ids=(2,))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written == {"base_model_name_or_path": str(tmp_path / "base"), "r": 2}


@pytest.mark.parametrize(("configured", "absolute"), [("base", True), ("./base", True), ("owner/base", False)])
def test_the_base_of_an_adapter_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: str, absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/scratch/copy"}))
    folder = write_run(tmp_path / "run", Path(configured))
    complete_student(tmp_path, load_run(folder.config).run, stop_ids=(2,))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == (str(tmp_path / "base") if absolute else configured)


def test_the_last_lines_of_a_run_say_what_a_whole_student_is(whole: RunFolder) -> None:
    assert "(a Hugging Face folder in float32: transformers and vLLM load it)" in closing_words(whole)


def test_the_last_lines_of_a_run_say_what_an_adapter_is(adapted: tuple[RunFolder, torch.Tensor]) -> None:
    assert "(an adapter in float32: peft loads it; stillhouse export --merge-adapter" in closing_words(adapted[0])


def test_a_student_with_a_link_out_of_its_folder_is_not_published(whole: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "private.json").write_text("{}")
    (whole.student / "notes.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(ConfigError, match=r"export: .*notes\.json is a link to .*outside of the folder"):
        export(whole.path, tmp_path / "target", merge_adapter=False)
    assert not (tmp_path / "target").exists()
