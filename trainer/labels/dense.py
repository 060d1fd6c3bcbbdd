"""Dense labels: the log-probability of every id, V values a row. What the other encodings are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import Dense
from trainer.labels.encoding import ABSENT, Column, TeacherShape
from trainer.model.fast import cache_blocks
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head


class Encoding(Dense):
    """Column `logprobs` [N, V] at `temperature`. float32 is exact; float16 halves the bytes and rounds a
    log-probability by up to 0.004 nats (above -16), bfloat16 by up to 0.03. The pair renormalises what was rounded."""

    needs: ClassVar[Literal["logits", "hidden"]] = "logits"

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        return (Column("logprobs", getattr(torch, self.dtype), shape.vocabulary_size),)

    def encode(self, source: torch.Tensor, target_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """From teacher logits [n, V] of any float dtype."""
        made = torch.empty(source.shape, dtype=getattr(torch, self.dtype), device=source.device)
        with torch.no_grad():
            for block in cache_blocks(source):
                logits = source[block].float() / self.temperature
                made[block] = logits.log_softmax(1).clamp_(min=ABSENT)
        return {"logprobs": made}

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        return labels

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None = None
    ) -> PairedLogProbs:
        """[n, V], exhaustive."""
        teacher = labels["logprobs"].to(logits.dtype)
        if self.dtype != "float32":
            teacher = teacher.log_softmax(1)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return PairedLogProbs(logits.log_softmax(1), teacher, exhaustive=True, student_scores=logits)

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return 1.0
