"""The exported folder holds the whole model: what is no parameter, and what transformers refuses to write, too."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from trainer.models import StudentModule
from trainer.student_export import export_student

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
