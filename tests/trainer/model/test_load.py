"""The teacher's head and the opened student against `model(...).logits` of transformers, family by family."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from architectures import architecture_folder
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_folder, tiny_model

from configs.models import LoRA, ModelSource, Trained
from trainer.errors import ConfigError
from trainer.model.attention import border_arguments
from trainer.model.load import StudentModule, load_student, load_teacher_head

HOST = torch.device("cpu")
VOCABULARY = 283  # of 320 rows
IDS = torch.tensor([[5, 17, 200, 3, 9, 41]])


def _head(folder: Path, **changes):
    options = {"vocabulary_size": VOCABULARY, "dtype": torch.float32, "device": HOST, **changes}
    return load_teacher_head(ModelSource(path=str(folder)), **options)


def _student(folder: Path, **changes) -> StudentModule:
    options = {
        "dtype": torch.float32,
        "attention": "sdpa",
        "vocabulary_size": VOCABULARY,
        "sharded": contextlib.nullcontext(),
        **changes,
    }
    return load_student(ModelSource(path=str(folder)), **options)


def _logits(student: StudentModule, rows: torch.Tensor) -> torch.Tensor:
    def product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor]:
        return (student.head_shape.apply(torch.nn.functional.linear(hidden, weight, bias)),)

    positions = torch.arange(IDS.shape[1])[None]
    borders = border_arguments("sdpa", (0, IDS.shape[1]), HOST)
    (logits,) = student(IDS, positions, rows, product, **borders)
    (whole,) = student(IDS, positions, rows, None, **borders)
    torch.testing.assert_close(logits, whole)
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_opened_student_equal_the_logits_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, family, tied=tied)
    model = tiny_model(family, tied=tied)
    model.config._attn_implementation = "eager"  # transformers' sdpa leaves gemma2's attention soft-cap out
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits[0]
        hidden = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state[0]
        ours = _logits(_student(folder), torch.tensor([1, 4]))
    torch.testing.assert_close(_head(folder).logits(hidden), expected[:, :VOCABULARY], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, expected[[1, 4]], rtol=1e-4, atol=1e-4)


def test_the_head_is_found_in_shards_and_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    weight = model.get_output_embeddings().weight[:VOCABULARY]
    assert torch.equal(_head(tmp_path / "shards").weight, weight)
    bare = tiny_folder(tmp_path / "bare", tied=True)
    tensors = load_file(bare / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, bare / "model.safetensors", {"format": "pt"})
    hidden = torch.randn(3, weight.shape[1], dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(hidden, weight.to(torch.bfloat16))
    torch.testing.assert_close(_head(bare, dtype=torch.bfloat16).product(hidden), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what lies where")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_of_a_machine_share_the_head_in_the_file(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever the teacher computes in: memory of a file is one for all processes."""
    folder = tiny_folder(tmp_path, tied=False)
    tensors = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    head = _head(folder, dtype=dtype)
    assert "model.safetensors" in _mapping_of(head.weight)
    hidden = torch.randn(5, head.weight.shape[1])
    weight = tensors["lm_head.weight"][:VOCABULARY]
    expected = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype))
    torch.testing.assert_close(head.product(hidden), expected, rtol=1e-5, atol=1e-5)
    assert head.product(hidden).dtype is dtype


def _mapping_of(tensor: torch.Tensor) -> str:
    """The line of this process's memory map that a tensor lies in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line
    raise AssertionError("a tensor lies nowhere")


def test_the_head_is_found_under_the_name_that_checkpoints_have_for_it(tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path, "gpt_neox")
    weight = load_file(folder / "model.safetensors")["embed_out.weight"]
    assert torch.equal(_head(folder).weight, weight[:VOCABULARY])


def test_the_head_of_a_model_that_also_sees_is_found_under_its_own_prefix(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, tied=True)
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    for names in (["language_model.model.embed_tokens.weight"], ["a.embed_tokens.weight", "b.embed_tokens.weight"]):
        save_file({name: weight.clone() for name in names}, folder / "model.safetensors", {"format": "pt"})
        if len(names) == 1:
            assert torch.equal(_head(folder).weight, weight[:VOCABULARY])
        else:  # which of the two?
            with pytest.raises(ConfigError, match="no tensor named"):
                _head(folder)


def test_a_head_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher.model: cannot read the configuration of .*nowhere"):
        _head(tmp_path / "nowhere")
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="has 320 rows for 400 tokens"):
        _head(folder, vocabulary_size=400)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no model.safetensors"):
        _head(folder)


def test_a_student_folder_that_cannot_be_trained_is_a_clear_error(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", tied=False)
    with pytest.raises(ConfigError, match="has 320 token embeddings, the tokenizer 400 tokens"):
        _student(folder, vocabulary_size=400)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks lm_head.weight of LlamaForCausalLM"):
        _student(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="transformers cannot load"):
        _student(folder)


def test_adapters_leave_base_and_head_frozen_and_start_as_nothing(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    plain, adapted = _student(folder), _student(folder, trained=Trained(LoRA(rank=4)))
    with torch.no_grad():
        rows = torch.arange(6)
        assert torch.equal(_logits(plain, rows), _logits(adapted, rows))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not adapted.causal.get_output_embeddings().weight.requires_grad


def test_adapters_on_the_head_or_on_nothing_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"lm_head.*adapts the embeddings or the head"):
        _student(folder, trained=Trained(LoRA(target_modules=("q_proj", "lm_head"))))
    for targets in ((), ("all-linear",)):
        with pytest.raises(
            ConfigError, match=r"target_modules: \[.*\]: write all-linear without brackets, or .*v_proj"
        ):
            _student(folder, trained=Trained(LoRA(target_modules=targets)))
    with pytest.raises(ConfigError, match=r"student.lora.target_modules: .*w_proj"):
        _student(folder, trained=Trained(LoRA(target_modules=("w_proj",))))
    with pytest.raises(ConfigError, match=r"no module of LlamaForCausalLM is named 'q_prj'; did you mean q_proj"):
        _student(folder, trained=Trained(LoRA(target_modules=("v_proj", "q_prj"))))
    with pytest.raises(ConfigError, match=r"student.lora.target_modules: .*mlp"):  # there, and no linear layer
        _student(folder, trained=Trained(LoRA(target_modules=("mlp", "q_proj"))))


def test_frozen_weights_are_those_that_were_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, tied=True)

    def frozen(*names: str) -> list[str]:
        student = _student(folder, trained=Trained(freeze=names))
        return [name for name, p in student.causal.named_parameters() if not p.requires_grad]

    assert frozen() == []
    assert frozen("embeddings") == frozen("lm_head") == ["model.embed_tokens.weight"], "a tied head is the embedding"
    first, second = frozen("model.layers.0"), frozen("model.layers.1")
    assert all(name.startswith("model.layers.0.") for name in first)
    assert len(first) == len(second) > 2
    norms = frozen("model.layers.*.input_layernorm.*")
    assert norms == ["model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"]
    with pytest.raises(ConfigError, match=r"student.freeze: .*'model.layer.0'; did you mean 'model.layers.0'"):
        frozen("model.layer.0")
    with pytest.raises(ConfigError, match=r"student.freeze: .*leaves nothing to train"):
        frozen("embeddings", "model")
