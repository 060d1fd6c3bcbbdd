"""`check` refuses the students that `train` refuses, and no other: architecture by architecture of transformers."""

from __future__ import annotations

import contextlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from every_architecture import ARCHITECTURES, save_architecture, tiny_config
from tiny_models import tiny_folder

from configs.models import ModelSource, Student
from launch.model_folder import read_facts
from trainer.errors import ConfigError
from trainer.model.attention import border_arguments
from trainer.model.attention_choice import choose_attention, refuse_unpackable
from trainer.model.load import build_on_meta, load_config, load_student
from trainer.model.suitability import refuse_unsuitable

HOST = torch.device("cpu")
OFFSETS = (0, 37, 61)

HANDFUL = ("llama", "gpt2", "opt", "mixtral", "deepseek_v3", "mamba", "stablelm", "falcon", "nemotron", "bert", "moshi",
           "bert-generation", "recurrent_gemma", "doge", "jamba", "gpt_oss", "lfm2")  # fmt: skip


def _checks(folder: Path) -> str | None:
    """What `check` says against the student of a folder; None where it is content."""
    source = ModelSource(path=str(folder))
    try:
        read_facts(source, path_name="student.model", student=Student(model=source), needs_weights=True)
        refuse_unpackable(load_config(source, role="student.model"), max_length=OFFSETS[-1])
    except ConfigError as error:
        return str(error)
    return None


def _trains(folder: Path) -> bool:
    """Whether the student can be built and computes of packed sequences what transformers computes of each alone."""
    source = ModelSource(path=str(folder))
    try:
        config = load_config(source, role="student.model")
        attention = choose_attention("auto", device_type=HOST.type, dtype="float32", config=config)
        options = {"dtype": torch.float32, "attention": attention, "vocabulary_size": 283}
        student = load_student(source, **options, sharded=contextlib.nullcontext()).eval()
    except ConfigError:
        return False
    return _packs(student)


@torch.no_grad()
def _packs(student: torch.nn.Module) -> bool:
    def product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor]:
        return (student.head_shape.apply(torch.nn.functional.linear(hidden, weight, bias)),)

    tokens = torch.randint(4, 283, (OFFSETS[-1],), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(OFFSETS)])
    borders = border_arguments("sdpa", OFFSETS, HOST)
    (packed,) = student(tokens[None], positions[None], torch.arange(len(tokens)), product, **borders)
    student.config._attn_implementation = "eager"
    alone = [student.causal(tokens[None, start:stop], use_cache=False).logits[0] for start, stop in pairwise(OFFSETS)]
    return torch.allclose(packed, torch.cat(alone), rtol=1e-3, atol=1e-3)


def _assert_same_verdict(name: str, folder: Path) -> None:
    if save_architecture(folder, name) is None:
        pytest.skip("does not build this small")
    said = _checks(folder)
    assert (said is None) == _trains(folder), said
    assert said is None or said.startswith("student.model: ")


@pytest.mark.parametrize("name", HANDFUL)
def test_check_and_training_agree_about_a_student(name: str, tmp_path: Path) -> None:
    _assert_same_verdict(name, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(HANDFUL)))
def test_check_and_training_agree_about_every_architecture(name: str, tmp_path: Path) -> None:
    _assert_same_verdict(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mamba", "MambaForCausalLM does not let others compute its attention"),
        ("stablelm", "StableLmForCausalLM does not let others compute its attention"),
        ("falcon", "student.model: a falcon does not let others compute its attention"),
        ("bert", "weights between its last hidden state and its head"),
        ("bert-generation", "student.model"),
    ],
)
def test_the_refusal_says_what_the_architecture_lacks(name: str, says: str, tmp_path: Path) -> None:
    save_architecture(tmp_path, name)
    assert says in _checks(tmp_path)


def test_a_quantised_student_is_refused_by_its_method(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(config | quantised))
    assert "weights are quantised (bitsandbytes)" in _checks(folder)


def test_checkpointing_of_activations_that_an_architecture_lacks_is_refused() -> None:
    student = Student(model=ModelSource(path="x"), activation_checkpointing=True)
    refuse_unsuitable(build_on_meta(student.model, tiny_config("llama"), role="x"), student)
    with pytest.raises(ConfigError, match=r"student\.activation_checkpointing: CTRLLMHeadModel does not offer it"):
        refuse_unsuitable(build_on_meta(student.model, tiny_config("ctrl"), role="x"), student)
