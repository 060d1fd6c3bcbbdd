"""Top-k labels: the k most probable ids of each row, their log-probabilities, and the log-mass of everything else.

The pair is over k + 1 events, the kept ids and one lumped tail. For forward_kl its gradient at the kept ids is exactly
that of the whole vocabulary (q - p); the tail event moves the student's remaining mass as a whole, q (1 - p_tail /
q_tail). Without a tail event the student learns p / P_kept and gets over-confident (arXiv 2503.16870 measures it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from configs.labels import TopK
from trainer.labels.encoding import ABSENT, Column, TeacherShape
from trainer.labels.kept import kept_and_tail, kept_layout, kept_pair
from trainer.labels.sparse import Kept, KeptIds
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head


class Encoding(TopK, KeptIds):
    """Columns, all at `temperature` and relative to the log-sum-exp over the whole vocabulary:

    `tail` float32 [N, 1], log-mass of the ids not kept; `target` float32 [N, 1], log-probability of the target
    id; `ids` uint16 [N, K] where V <= 65536, else int32, most probable first; `logprobs` float16 [N, K] of these
    ids. Control ids are among the k.
    """

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        """Raises `ValueError` where k exceeds the vocabulary."""
        self._check_vocabulary(shape.vocabulary_size)
        return kept_layout(self.k, shape)

    def columns_of(self, kept: Kept) -> dict[str, torch.Tensor]:
        total = kept.total
        return {
            "tail": (kept.rest - total).clamp_(min=ABSENT),
            "target": (kept.target - total).clamp_(min=ABSENT),
            "ids": kept.ids,
            "logprobs": (kept.values - total).clamp_(min=ABSENT),
        }

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None = None
    ) -> PairedLogProbs:
        """[n, K + 1] events, the tail last. The teacher's are its columns, renormalised: that removes the float16
        rounding of `logprobs` (at most 0.004 nats) and nothing else, since the mass of kept ids and tail is one."""
        teacher = torch.cat([labels["logprobs"].to(logits.dtype), labels["tail"].to(logits.dtype)], dim=1)
        ids = labels["ids"].long()
        events = kept_and_tail(logits, ids, self.temperature)
        return kept_pair(events, teacher, ids, labels)

    def _check_vocabulary(self, vocabulary_size: int) -> None:
        if self.k > vocabulary_size:
            raise ValueError(
                f"labels.k is {self.k}, but the vocabulary has only V = {vocabulary_size} entries: write k: "
                f"{vocabulary_size} or less, or kind: dense"
            )
