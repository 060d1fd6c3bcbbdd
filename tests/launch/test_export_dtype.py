"""`stillhouse export --dtype`: what is written is what transformers makes of the student when it rounds it itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from student_runs import IDS
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from configs.load import load_run
from launch.cli import app
from launch.export import export, stored_dtype
from launch.export_check import compare
from trainer.errors import ConfigError
from trainer.model.cast import cast_folder
from trainer.run_folder import RunFolder

NARROW = ("bfloat16", "float16")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def same_as_transformers(exported: Path, source: Path, dtype: str) -> bool:
    """Dtype and every bit of every tensor of both models, loaded as a user would."""
    ours = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).state_dict()
    assert ours.keys() == theirs.keys()
    return all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [*NARROW, "float32"])
def test_a_student_in_another_dtype_is_what_transformers_makes_of_it(
    whole: RunFolder, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    result = CliRunner().invoke(app, ["export", str(whole.path), str(target), "--dtype", dtype])
    assert result.exit_code == 0, result.output
    assert stored_dtype(target) == dtype
    assert same_as_transformers(target, whole.student, dtype)
    assert not same_as_transformers(target, whole.student, "bfloat16" if dtype != "bfloat16" else "float16")
    assert json.loads((target / "config.json").read_text())["dtype"] == dtype
    assert "lm_head.weight" not in load_file(target / "model.safetensors")  # tied, and written once
    card = (target / "README.md").read_text()
    if dtype == "float32":
        assert "| weights stored in | float32 |" in card
        assert "KL" not in result.output
    else:
        assert f"| weights stored in | {dtype}, rounded from float32 when it was exported |" in card
        assert "KL to the student before" in result.output
    assert target.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}


def test_a_student_of_several_files_keeps_its_index_and_no_file_is_held_in_memory(
    whole: RunFolder, tmp_path: Path
) -> None:
    shutil.rmtree(whole.student)
    tiny_model("qwen3", tied=False).save_pretrained(whole.student, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(whole.student)
    assert len(list(whole.student.glob("*.safetensors"))) > 2
    target = tmp_path / "target"
    export(whole.path, target, merge_adapter=False, dtype="bfloat16")
    assert same_as_transformers(target, whole.student, "bfloat16")
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (whole.student, target)
    )
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] / 2


@pytest.mark.parametrize("dtype", NARROW)
def test_what_the_architecture_keeps_in_float32_stays_so(whole: RunFolder, tmp_path: Path, dtype: str) -> None:
    shutil.rmtree(whole.student)
    model = tiny_model("glm4_moe")
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.uniform_(1, 2)
    model.save_pretrained(whole.student)
    tiny_tokenizer().save_pretrained(whole.student)
    target = tmp_path / "target"
    export(whole.path, target, merge_adapter=False, dtype=dtype)
    assert same_as_transformers(target, whole.student, dtype)
    with safe_open(target / "model.safetensors", framework="pt") as tensors:
        dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    biases = {name for name in dtypes if "e_score_correction_bias" in name}
    assert biases
    assert {name for name, stored in dtypes.items() if stored == "F32"} == biases


def test_a_number_beyond_float16_is_refused_by_name_and_nothing_is_left(whole: RunFolder, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][3, 5] = -70000.0
        weights["model.norm.weight"][0] = 65519.0  # rounds to 65504

    change_weights(whole.student, change)
    with pytest.raises(ConfigError) as refused:
        export(whole.path, tmp_path / "target", merge_adapter=False, dtype="float16")
    assert str(refused.value) == (
        "export: float16 holds numbers up to 65504, and a tensor has larger ones, which would become infinity: "
        "model.layers.0.mlp.up_proj.weight (7e+04). Choose bfloat16 or float32"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export(whole.path, tmp_path / "target", merge_adapter=False, dtype="bfloat16")


def test_a_weight_that_is_no_number_is_refused(whole: RunFolder, tmp_path: Path) -> None:
    change_weights(whole.student, lambda weights: weights["model.norm.weight"][0].fill_(torch.nan))
    with pytest.raises(ConfigError, match=r"export: model\.norm\.weight holds NaN or infinity; look at the losses"):
        export(whole.path, tmp_path / "target", merge_adapter=False, dtype="bfloat16")


def test_values_that_become_zero_are_counted(
    whole: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(whole.student, lambda weights: weights["model.norm.weight"][:3].fill_(1e-9))
    export(whole.path, tmp_path / "target", merge_adapter=False, dtype="float16")
    assert "\n  3 values (" in capsys.readouterr().out


def test_an_export_that_does_not_compute_what_the_student_does_is_found(whole: RunFolder, tmp_path: Path) -> None:
    """Two tensors of one shape change places: every file loads, every number is finite."""
    run, target = load_run(whole.config).run, tmp_path / "target"
    export(whole.path, target, merge_adapter=False, dtype="bfloat16")
    change = compare(whole.student, target, run, dtype="bfloat16")
    assert 0 < change.kl < 0.01
    assert change.num_tokens > 50

    def swap(weights: dict[str, torch.Tensor]) -> None:
        gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        weights[gate], weights[up] = weights[up], weights[gate]

    change_weights(target, swap)
    with pytest.raises(ConfigError, match=r"logits of what was written differ by .* from the student's in bfloat16"):
        compare(whole.student, target, run, dtype="bfloat16")


def test_values_between_layers_that_overflow_float16_are_found(whole: RunFolder, tmp_path: Path) -> None:
    """Every weight fits, and a product of two does not."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights[f"model.layers.0.mlp.{name}.weight"] *= 2000

    change_weights(whole.student, change)
    with pytest.raises(ConfigError, match="not finite"):
        export(whole.path, tmp_path / "target", merge_adapter=False, dtype="float16")
    export(whole.path, tmp_path / "other", merge_adapter=False, dtype="bfloat16")


def test_an_adapter_is_rounded_alone_and_merged(
    adapted: tuple[RunFolder, torch.Tensor], tmp_path: Path, tiny_student: Path
) -> None:
    folder, expected = adapted
    export(folder.path, tmp_path / "adapter", merge_adapter=False, dtype="bfloat16")
    export(folder.path, tmp_path / "merged", merge_adapter=True, dtype="bfloat16")
    assert stored_dtype(tmp_path / "adapter") == stored_dtype(tmp_path / "merged") == "bfloat16"
    rounded = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, value in load_file(folder.student / "adapter_model.safetensors").items():
        assert torch.equal(rounded[name], value.bfloat16())
    source = peft.AutoPeftModelForCausalLM.from_pretrained(folder.student)
    merged = source.merge_and_unload().bfloat16().state_dict()  # added in float32, rounded once
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert all(torch.equal(value, merged[name]) for name, value in written.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(written.float().eval()(IDS).logits, expected, atol=0.05 * float(expected.abs().max()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "run"]


def test_integers_and_scalars_pass_and_the_file_is_read_by_its_own_library(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    weights = {
        "b": torch.tensor(1.5),
        "a": torch.randn(3, 5),
        "ids": torch.arange(7),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "half": torch.randn(3).half(),
    }
    save_file(weights, source / "x.safetensors", metadata={"format": "pt", "mine": "yes"})
    rounding = cast_folder(source, target, "bfloat16", keeps=lambda name: name == "half")
    read = load_file(target / "x.safetensors")
    for name, value in weights.items():
        plain = name == "half" or not value.is_floating_point()
        assert torch.equal(read[name], value if plain else value.bfloat16()), name
    assert rounding.kept == ["half"]
    with safe_open(target / "x.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt", "mine": "yes"}


def test_parts_of_a_configuration_follow_and_what_json_lacks_stays(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    config = {"torch_dtype": "float32", "limit": float("inf"), "text_config": {"dtype": "float32"}, "vision": {"a": 1}}
    (target / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(2)}, source / "x.safetensors")
    cast_folder(source, target, "float16", keeps=lambda name: False)
    assert json.loads((target / "config.json").read_text()) == {
        **config,
        "torch_dtype": "float16",
        "text_config": {"dtype": "float16"},
    }


def test_a_dtype_that_is_none_is_refused_with_the_ones_that_are(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "runs/x", str(tmp_path / "y"), "--dtype", "fp16"])
    assert result.exit_code == 2
    assert all(name in result.output for name in ("bfloat16", "float16", "float32"))
