"""Finished runs whose student is a whole model, or an adapter."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from student_runs import IDS, write_run
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM

from trainer.run_folder import RunFolder


@pytest.fixture
def whole(tmp_path: Path, tiny_student: Path) -> RunFolder:
    """A run whose student is a whole model."""
    folder = write_run(tmp_path / "run", tiny_student)
    AutoModelForCausalLM.from_pretrained(tiny_student).save_pretrained(folder.student)
    tiny_tokenizer().save_pretrained(folder.student)
    return folder


@pytest.fixture
def adapted(tmp_path: Path, tiny_student: Path) -> tuple[RunFolder, torch.Tensor]:
    """A run whose student is an adapter that changes something, and the logits of base + adapter."""
    folder = write_run(tmp_path / "run", tiny_student, lora={"rank": 2})
    base = AutoModelForCausalLM.from_pretrained(tiny_student)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder.student)
    tiny_tokenizer().save_pretrained(folder.student)
    with torch.no_grad():
        return folder, model.eval()(IDS).logits
