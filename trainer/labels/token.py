"""Token labels: the teacher's log-probability of the target id, 4 bytes a row. What a reference is asked for by terms
that compare whole answers; no divergence can be computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import Token
from trainer.labels.encoding import ABSENT, Column, TeacherShape
from trainer.model.fast import cache_blocks, softmax_and_log_sum_exp
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
        made = torch.empty(source.shape[0], 1, dtype=torch.float32, device=source.device)
        with torch.no_grad():
            for block in cache_blocks(source):
                logits = source[block].float() / self.temperature
                made[block] = logits.log_softmax(1).gather(1, target_ids[block, None]).clamp_(min=ABSENT)
        return {LOGPROB: made}

    def encode_shard(self, source: torch.Tensor, target_ids: torch.Tensor, first_id: int) -> torch.Tensor:
        """float32 [n, 2] of a shard's logits [n, v], the columns from `first_id` on: their log-sum-exp, and the target
        id's, -inf where another shard has it."""
        made = torch.empty(source.shape[0], 2, dtype=torch.float32, device=source.device)
        with torch.no_grad():
            for block in cache_blocks(source):
                logits = source[block].float() / self.temperature
                places = target_ids[block, None] - first_id
                inside = (places >= 0) & (places < logits.shape[1])
                target = logits.gather(1, places.clamp(0, logits.shape[1] - 1))
                made[block, :1] = softmax_and_log_sum_exp(logits)[1]
                made[block, 1:] = target.masked_fill(~inside, -torch.inf)
        return made

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
