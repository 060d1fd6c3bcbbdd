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
    dtype: torch.dtype | None = None  # that products are computed in; None: the weight's

    def product(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden @ weight.T + bias` [n, V], in the head's dtype, a tensor of the caller's own; written to the first
        rows of `out`, of `whole_rows(hidden)` at least, where that is given.

        A weight in another dtype is cast some rows at a time: it may lie in a file that all ranks of a machine share.
        """
        rows = whole_rows(hidden.to(self.dtype or self.weight.dtype))
        v, out = self.vocabulary_size, None if out is None else out[: rows.shape[0]]
        z = matmul_nt(rows, self.weight[:v], out)[: hidden.shape[0]]
        return z if self.bias is None else z.add_(self.bias.detach()[:v])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [n, V] from hidden [n, H], computed in the head's dtype."""
        return self.shape.apply(self.product(hidden).float())
