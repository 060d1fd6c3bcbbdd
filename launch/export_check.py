"""Whether an exported folder is a model that works, and whether rounding its weights left its answers what they were.

A file of its own because it loads folders as their users will, and knows nothing of how they were written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import Run
from trainer.errors import ConfigError, foreign_errors

ADAPTER = "adapter_config.json"
_PROBE = (
    "A still turns a large wash into a small clear spirit, drop by drop. Question: what is 17 + 25? Answer: 42. "
    "def add(a, b):\n    return a + b\n"
)
_TOLERANCE = 8
"""Spacings of the dtype at the largest logit, between two models of equal weights: kernels may add in another order."""


@dataclass(frozen=True, slots=True)
class Change:
    """What rounding the weights did to the predictions of the probe text."""

    num_tokens: int
    kl: float  # nats per token, KL(before, after)
    agreement: float  # share of tokens whose likeliest successor is the same


def base_of(adapter: Path, run: Run, *, dtype: str = "auto") -> Any:
    """The base model of an adapter, in the dtype it is stored in, or in another."""
    name = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    source = run.student.model
    try:
        return AutoModelForCausalLM.from_pretrained(
            name or source.path,
            revision=source.revision,
            dtype=dtype,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"export: the base model {name or source.path} of the adapter does not load: {error}"
        ) from None


def load_exported(folder: Path, run: Run) -> tuple[Any, Any]:
    """Model, in evaluation mode, and tokenizer of a student's folder, as a user would load them; an adapter on its
    base. Raises ConfigError with what is wrong."""
    try:
        tokenizer = _tokenizer(folder, run)
        model, missing = _load(folder, run)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"export: transformers does not load the student: {error}") from error
    if missing:
        raise ConfigError(f"export: the student lacks {len(missing)} weights, first {missing[0]}")
    return model.eval(), tokenizer


def verify(model_folder: Path, run: Run) -> None:
    """Load the folder and predict one token. Raises ConfigError with what is wrong."""
    model, tokenizer = load_exported(model_folder, run)
    token_ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(token_ids).logits
    if not torch.isfinite(logits).all():
        raise ConfigError("export: the student's logits are not finite; look at the losses in the report")


def compare(source: Path, exported: Path, run: Run, *, dtype: str) -> Change:
    """How the predictions of `exported` differ from those of `source`, whose weights were rounded to `dtype`.

    Raises `ConfigError` where `exported` does not compute what transformers makes of `source` when it rounds the
    weights itself, so that a tensor lost, swapped or torn is no export; and where activations in `dtype` overflow.
    """
    token_ids = _tokenizer(source, run)(_PROBE, return_tensors="pt")["input_ids"]
    with foreign_errors("export: the exported student cannot be compared with the run's"):
        before = _logits(_load(source, run)[0], token_ids)
        expected = _logits(_rounded(source, run, dtype), token_ids)
        after = _logits(_load(exported, run)[0], token_ids)
    if not torch.isfinite(after).all():
        raise ConfigError(
            f"export: the weights fit {dtype} and the values between the layers do not: logits of a test text are not "
            "finite. Choose bfloat16 or float32"
        )
    largest = float((after - expected).abs().max())
    if largest > _TOLERANCE * torch.finfo(getattr(torch, dtype)).eps * float(expected.abs().max()):
        raise ConfigError(f"export: logits of what was written differ by {largest:.3g} from the student's in {dtype}")
    logp, logq = before.log_softmax(-1), after.log_softmax(-1)
    return Change(
        num_tokens=len(before),
        kl=float((logp.exp() * (logp - logq)).sum(-1).mean()),
        agreement=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
    )


def _tokenizer(folder: Path, run: Run) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=run.student.model.trust_remote_code)


def _load(folder: Path, run: Run, *, dtype: str = "auto") -> tuple[Any, list[str]]:
    """The model, and the weights that it lacks."""
    if (folder / ADAPTER).exists():
        return peft.PeftModel.from_pretrained(base_of(folder, run), folder), []
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=run.student.model.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    return model, sorted(loading["missing_keys"])


def _rounded(folder: Path, run: Run, dtype: str) -> Any:
    """The student with weights rounded by a library: transformers, and of an adapter torch, since peft rounds none."""
    if not (folder / ADAPTER).exists():
        return _load(folder, run, dtype=dtype)[0]
    model, _ = _load(folder, run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.to(getattr(torch, dtype)))
    return model


def _logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """[L, V], in float32."""
    with torch.inference_mode():
        return model.eval()(token_ids).logits[0].float()
