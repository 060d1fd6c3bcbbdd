"""Tensors that a folder lacks, or has in other shapes: refused wherever weights are read, and before one is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_architecture import ARCHITECTURES, save_architecture
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder
from transformers import AutoModelForCausalLM
from vllm_process import engine_plan

from cluster.engines.hf import Engine, load_model
from configs.models import ModelSource
from launch.model_folder import find_model, read_facts
from trainer.checks.label_check import teacher_truth
from trainer.errors import ConfigError
from trainer.model.load import build_on_meta, load_config, load_student
from trainer.model.weights import read_table, refuse_other_tensors
from trainer.types import Unit

NORM = "model.norm.weight"


def _without(folder: Path, *names: str, **changed: torch.Tensor) -> Path:
    """The folder with some tensors taken out, and some replaced."""
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in names}
    save_file(tensors | changed, file, {"format": "pt"})
    return folder


def _check(folder: Path) -> object:
    return read_facts(ModelSource(path=str(folder)), path_name="teacher.model.path", needs_weights=True)


def _student(folder: Path) -> object:
    source = ModelSource(path=str(folder))
    options = {"dtype": torch.float32, "attention": "sdpa", "vocabulary_size": 283}
    return load_student(source, **options, sharded=contextlib.nullcontext())


def _engine(folder: Path) -> object:
    return load_model(engine_plan(Engine(), folder))


def _reference(folder: Path) -> object:
    source = ModelSource(path=str(folder))
    return teacher_truth(Unit(id="u", sequences=()), source, vocabulary_size=283, dtype="float32")


@pytest.mark.parametrize("read", [_check, _student, _engine, _reference])
def test_a_folder_without_its_final_norm_is_refused_by_everyone_who_reads_it(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = _without(tiny_folder(tmp_path / "model"), NORM)
    AutoModelForCausalLM.from_pretrained(folder)  # transformers says nothing
    with pytest.raises(ConfigError, match=r"lacks model\.norm\.weight of LlamaForCausalLM.*random"):
        read(folder)


@pytest.mark.parametrize(
    ("family", "lost", "says"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "lacks model.layers.1.mlp.up_proj.weight"),
        (
            "qwen2_moe",
            "model.layers.0.mlp.experts.2.gate_proj.weight",
            "mlp.experts.2.gate_proj.weight",
        ),  # fused when it is loaded
        ("glm4_moe", "model.layers.1.mlp.gate.e_score_correction_bias", "e_score_correction_bias"),  # a buffer
    ],
)
def test_check_reads_no_weight_and_knows_which_is_missing(family: str, lost: str, says: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", family)
    assert _check(folder)
    assert lost in load_file(folder / "model.safetensors")
    _without(folder, lost)
    table = (folder / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(table[:8], "little")
    (folder / "model.safetensors").write_bytes(table[:length] + b"\xff" * (len(table) - length))  # NaN, if it were read
    with pytest.raises(ConfigError, match=says):
        _check(folder)


def test_tensors_of_another_shape_are_refused_and_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ConfigError, match=r"down_proj.weight of .* has the shape \[64, 128\].* needs \[64, 96\]"):
        _check(folder)


def test_what_transformers_does_without_is_not_missed(tmp_path: Path) -> None:
    """A tied head, a name without the prefix of the base model, tensors that nobody asks for."""
    folder = tiny_folder(tmp_path / "model", tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert _check(folder)
    _without(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    assert _check(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    assert _check(folder)


def test_shards_are_read_whole_whatever_their_index_says(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path / "model"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert _check(tmp_path / "shards")
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    shard = tmp_path / "shards" / index["weight_map"][NORM]
    tensors = load_file(shard)
    del tensors[NORM]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks model\.norm\.weight"):
        _check(tmp_path / "shards")


def test_of_a_quantised_folder_only_what_is_stored_plainly_is_compared(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    packed = {n: t for n, t in tensors.items() if not n.endswith("proj.weight")}
    for name in tensors.keys() - packed.keys():
        packed[name.replace(".weight", ".qweight")] = torch.zeros(4, 4, dtype=torch.int32)
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    (folder / "config.json").write_text(json.dumps(config | quantised))
    assert _check(folder)
    _without(folder, NORM)
    with pytest.raises(ConfigError, match=r"lacks model\.norm\.weight"):
        _check(folder)


def test_a_table_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    with (folder / "model.safetensors").open("wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**41)  # a hole of two terabytes
    with pytest.raises(ConfigError, match=r"has 2199023255552 bytes of"):
        find_model(ModelSource(path=str(folder)), path_name="student.model.path", needs_weights=True)


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tables_say_of_every_architecture_what_loading_says(name: str, tmp_path: Path) -> None:
    model = save_architecture(tmp_path, name)
    if model is None:
        pytest.skip("does not build this small")
    source, file = ModelSource(path=str(tmp_path)), tmp_path / "model.safetensors"
    on_meta = build_on_meta(source, load_config(source, role="x"), role="x")
    refuse_other_tensors(on_meta, read_table(file, role="x"), role="x", place="here")
    stored = load_file(file)
    for lost in list(stored)[:: max(1, len(stored) // 5)]:
        save_file({n: t for n, t in stored.items() if n != lost}, file, {"format": "pt"})
        try:
            _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
            fine = not info["missing_keys"]
        except RuntimeError:  # experts that cannot be fused
            fine = False
        expected = contextlib.nullcontext() if fine else pytest.raises(ConfigError)
        with expected:
            refuse_other_tensors(on_meta, read_table(file, role="x"), role="x", place="here")
