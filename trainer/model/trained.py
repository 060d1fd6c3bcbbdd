"""Which weights of a student learn: adapters alone, or all but those that are frozen."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import peft
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from configs.models import LoRA, Trained
from trainer.errors import ConfigError, foreign_errors

EMBEDDINGS = "embeddings"


def choose_trained(causal: PreTrainedModel, trained: Trained, *, revision: str | None) -> peft.PeftModel | None:
    """Put adapters into `causal`, or freeze weights of it; on the meta device too. The answer: the adapted model.

    Raises `ConfigError` for names that are not in the model, and where nothing would be left to train.
    """
    if trained.lora is not None:
        return add_adapters(causal, trained.lora, revision=revision)
    for name in trained.freeze:
        for parameter in _called(causal, name):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in causal.parameters()):
        raise ConfigError(f"student.freeze: {list(trained.freeze)} leaves nothing to train")
    return None


def _called(causal: PreTrainedModel, name: str) -> list[torch.nn.Parameter]:
    """Parameters of a name, of a module of that name, or of all that a pattern with * or ? names."""
    if name == EMBEDDINGS:
        return [parameter for module in _embeddings(causal) for parameter in module.parameters()]
    names = dict(causal.named_parameters(remove_duplicate=False))  # a tied head goes by both of its names
    found = [p for known, p in names.items() if fnmatchcase(known, name) or known.startswith(f"{name}.")]
    if not found:
        known = [EMBEDDINGS, *names, *(module for module, _ in causal.named_modules() if module)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {next(iter(names))!r}."
        raise ConfigError(
            f"student.freeze: no weight of {type(causal).__name__} is named {name!r}; {hint} Write names of the model "
            f"(* stands for any part), or {EMBEDDINGS} for the token embeddings and the head"
        )
    return found


def add_adapters(causal: PreTrainedModel, lora: LoRA, *, revision: str | None) -> peft.PeftModel:
    """Put adapters into `causal`; on the meta device too. Raises `ConfigError` for targets that are not there."""
    if lora.target_modules != "all-linear":
        _refuse_unknown_targets(causal, lora.target_modules)
    target = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    with foreign_errors(f"student.lora.target_modules: {target}"):
        adapted = peft.get_peft_model(causal, settings, autocast_adapter_dtype=False)
    if any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in _embeddings(causal)):
        raise ConfigError(
            f"student.lora.target_modules: {target} adapts the embeddings or the head; adapt the layers between them, "
            "for example with target_modules: all-linear"
        )
    return adapted


def _refuse_unknown_targets(causal: PreTrainedModel, targets: Sequence[str]) -> None:
    """peft is content when one of several targets is there, and leaves the others out."""
    names = [name for name, _ in causal.named_modules()]
    head = causal.get_output_embeddings()
    known = sorted({n.rpartition(".")[2] for n, m in causal.named_modules() if is_linear(m) and m is not head})
    if not targets or "all-linear" in targets:
        raise ConfigError(
            f"student.lora.target_modules: {list(targets)}: write all-linear without brackets, or name some of "
            f"{', '.join(known)}"
        )
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target.rpartition(".")[2], known, n=1)
            hint = f"did you mean {near[0]}? There are" if near else "there are"
            raise ConfigError(
                f"student.lora.target_modules: no module of {type(causal).__name__} is named {target!r}; {hint} "
                f"{', '.join(known)}, and all-linear for all of them"
            )


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D)


def _embeddings(causal: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    return causal.get_input_embeddings(), causal.get_output_embeddings()
