"""The map from final hidden states to logits, for a student and for a teacher known only by its head.

Most architectures multiply by lm_head and stop; some scale, some soft-cap. `Head` holds what is known of that, so that
the loss, the evaluation and the self-test compute the same logits as `model(...).logits`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from trainer.errors import foreign_errors
from trainer.model.fast import matmul_nt, whole_rows


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How logits follow from `hidden @ weight.T + bias`: multiply by `scale`, then soft-cap."""

    scale: float = 1.0
    soft_cap: float | None = None  # c * tanh(z / c), Gemma 2 (arXiv 2408.00118, section 2)

    @classmethod
    def of_config(cls, config: Any) -> HeadShape:
        """From a transformers config. Fields: `final_logit_softcapping` (Gemma), `logits_scaling` (Granite, a divisor;
        HyperCLOVA X, a factor), `logit_scale` (Cohere, a factor), `lm_head_multiplier` (Falcon-H1, a factor). An
        architecture that does something else is caught by the label self-test."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = (getattr(text, "logit_scale", None) or 1.0) * (getattr(text, "lm_head_multiplier", None) or 1.0)
        scaling = getattr(text, "logits_scaling", None) or 1.0
        scale = scale * scaling if getattr(text, "model_type", "") == "hyperclovax" else scale / scaling
        return cls(scale=scale, soft_cap=getattr(text, "final_logit_softcapping", None))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and soft-cap; returns `logits` itself where there is nothing to do."""
        if not math.isclose(self.scale, 1.0):
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits


def head_width(config: Any, *, trust_remote_code: bool = False) -> int:
    """H of the hidden states that the head of a model with this transformers config reads. Of most models it is
    `hidden_size`; OPT-350m projects its hidden states to half of it before."""
    from transformers import AutoModelForCausalLM

    doing = f"transformers cannot build a {config.model_type} from its configuration"
    with foreign_errors(doing), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model.get_output_embeddings().weight.shape[1]


@dataclass(frozen=True, slots=True)
class Head:
    """A head: `weight` [>= V, H], `bias` [>= V] or None; rows beyond V are padding and never used.

    Nothing here carries a gradient; the student's own gradient is `trainer/losses/fused.py`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    shape: HeadShape
    vocabulary_size: int

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden @ weight.T + bias` [n, V], in the dtype of the weight, a tensor of the caller's own."""
        v = self.vocabulary_size
        z = matmul_nt(whole_rows(hidden.to(self.weight.dtype)), self.weight[:v])[: hidden.shape[0]]
        return z if self.bias is None else z.add_(self.bias.detach()[:v])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [n, V] from hidden [n, H], computed in the dtype of the weight."""
        return self.shape.apply(self.product(hidden).float())
