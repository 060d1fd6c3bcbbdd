"""Token labels: the teacher's log-probability of the target id, 4 bytes a row. What a reference is asked for by terms
that compare whole answers; no divergence can be computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import Token
from trainer.labels.encoding import ABSENT, Column, TeacherShape, target_logits
from trainer.model.fast import log_sum_exp_without
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head

LOGPROB = "logprob"


class Encoding(Token):
    """Column `logprob` float32 [N, 1], of the whole vocabulary at `temperature`."""

    needs: ClassVar[Literal["logits", "hidden"]] = "logits"
    shard_width: ClassVar[int] = 2

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        return (Column(LOGPROB, torch.float32, 1),)

    def encode(self, source: torch.Tensor, target_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """From teacher logits [n, V] of any float dtype."""
        return self.merge_shards([self.encode_shard(source, target_ids, 0)], source.shape[1])

    def encode_shard(self, source: torch.Tensor, target_ids: torch.Tensor, first_id: int) -> torch.Tensor:
        """float32 [n, 2] of a shard's logits [n, v], the columns from `first_id` on: their log-sum-exp, and the target
        id's, -inf where another shard has it."""
        with torch.no_grad():
            total = log_sum_exp_without(source, target_ids.new_empty(len(source), 0), self.temperature)
            return torch.cat([total, target_logits(source, target_ids, first_id) / self.temperature], dim=1)

    def merge_shards(self, shards: AbstractSequence[torch.Tensor], vocabulary_size: int) -> dict[str, torch.Tensor]:
        """The columns of `encode`, from what `encode_shard` made of each shard of the vocabulary."""
        sums, targets = torch.stack(list(shards)).unbind(2)
        return {LOGPROB: (targets.amax(0) - sums.logsumexp(0)).clamp_(min=ABSENT)[:, None]}

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        return labels

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None = None
    ) -> PairedLogProbs:
        """There is none: one number is no distribution. `configs/` refuses every term that would ask."""
        raise ValueError("labels: token hold no distribution; write labels: topk")

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return float(np.exp(columns[LOGPROB]).mean())
