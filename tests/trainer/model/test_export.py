"""The exported folder holds the whole model: what is no parameter, and what transformers refuses to write, too."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from trainer.errors import Diverged
from trainer.model.export import export_student
from trainer.model.load import StudentModule

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])


def _with_bias(model: torch.nn.Module) -> torch.nn.Module:
    """Trained enough for the experts' bias to matter."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-1, 1, buffer.numel()))
    return model


@pytest.mark.parametrize("merged", [False, True])
def test_what_belongs_to_the_model_and_is_no_parameter_is_exported(tmp_path: Path, merged: bool) -> None:
    causal = _with_bias(tiny_model("glm4_moe"))
    adapter = None
    if merged:
        adapter = peft.get_peft_model(causal, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    expected = causal(IDS).logits
    export_student(StudentModule(causal, adapter=adapter), tmp_path, first_rank=True, merge_adapter=merged)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    torch.testing.assert_close(again.eval()(IDS).logits, expected)


def test_a_generation_config_that_contradicts_itself_does_not_end_a_run_at_its_export(tmp_path: Path) -> None:
    causal = tiny_model("llama")
    causal.generation_config = GenerationConfig(eos_token_id=5)
    causal.generation_config.temperature, causal.generation_config.top_p = 0.9, 0.6  # as old folders have it
    export_student(StudentModule(causal, adapter=None), tmp_path, first_rank=True)
    written = GenerationConfig.from_pretrained(tmp_path)
    assert written.eos_token_id == 5
    assert not written.do_sample


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("adapted", [False, True])
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(
    tmp_path: Path, tiny_student: Path, adapted: bool, value: float
) -> None:
    causal = AutoModelForCausalLM.from_pretrained(tiny_student)
    adapter = peft.get_peft_model(causal, peft.LoraConfig(r=2, target_modules=["q_proj"])) if adapted else None
    name = "lora_B.default.weight" if adapted else "layers.0.mlp.down_proj.weight"
    weight = next(p for n, p in causal.named_parameters() if n.endswith(name))
    with torch.no_grad():
        weight.view(-1)[1] = value
    target = tmp_path / "student"
    with pytest.raises(Diverged, match=rf"1 of the student's weights hold NaN or infinity, first .*{name}"):
        export_student(StudentModule(causal, adapter=adapter), target, first_rank=True)
    assert not target.exists()
    with torch.no_grad():
        weight.view(-1)[1] = 3e38  # large, and finite
    export_student(StudentModule(causal, adapter=adapter), target, first_rank=True)
    assert any(target.glob("*.safetensors"))
