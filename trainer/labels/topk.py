"""Top-k labels: the k most probable ids of each row, their log-probabilities, and the log-mass of everything else.

The pair is over k + 1 events, the kept ids and one lumped tail. For forward_kl its gradient at the kept ids is exactly
that of the whole vocabulary (q - p); the tail event moves the student's remaining mass as a whole, q (1 - p_tail /
q_tail). Without a tail event the student learns p / P_kept and gets over-confident (arXiv 2503.16870 measures it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import TopK
from trainer.labels.encoding import ABSENT, Column, TeacherShape
from trainer.labels.kept import id_dtype, kept_and_tail, rest_of
from trainer.model.fast import cache_blocks, top_k
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head


class Encoding(TopK):
    """Columns, all at `temperature` and relative to the log-sum-exp over the whole vocabulary:

    `tail` float32 [N, 1], log-mass of the ids not kept; `target` float32 [N, 1], log-probability of the target
    id; `ids` uint16 [N, K] where V <= 65536, else int32, most probable first; `logprobs` float16 [N, K] of these
    ids.
    """

    needs: ClassVar[Literal["logits", "hidden"]] = "logits"

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        """Raises `ValueError` where k exceeds the vocabulary."""
        self._check_vocabulary(shape.vocabulary_size)
        wide = (Column("tail", torch.float32, 1), Column("target", torch.float32, 1))
        ids = Column("ids", id_dtype(shape.vocabulary_size), self.k)
        logprobs = Column("logprobs", torch.float16, self.k)
        return (*wide, *sorted((ids, logprobs), key=lambda column: -column.dtype.itemsize))

    def encode(self, source: torch.Tensor, target_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """From teacher logits [n, V] of any float dtype. Raises `ValueError` where k exceeds V."""
        n, v = source.shape
        self._check_vocabulary(v)
        columns = {
            "tail": source.new_empty(n, 1, dtype=torch.float32),
            "target": source.new_empty(n, 1, dtype=torch.float32),
            "ids": source.new_empty(n, self.k, dtype=id_dtype(v)),
            "logprobs": source.new_empty(n, self.k, dtype=torch.float16),
        }
        with torch.no_grad():
            for block in cache_blocks(source):
                made = self._encode_block(source[block].float(), target_ids[block])
                for name, values in made.items():
                    columns[name][block] = values.to(columns[name].dtype)
        return columns

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        return labels

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None = None
    ) -> PairedLogProbs:
        """[n, K + 1] events, the tail last. The teacher's are its columns, renormalised: that removes the float16
        rounding of `logprobs` (at most 0.004 nats) and nothing else, since the mass of kept ids and tail is one."""
        teacher = torch.cat([labels["logprobs"].to(logits.dtype), labels["tail"].to(logits.dtype)], dim=1)
        ids = labels["ids"].long()
        events = kept_and_tail(logits, ids, self.temperature)
        return PairedLogProbs(
            events.log_softmax(1),
            teacher.log_softmax(1),
            exhaustive=False,
            student_scores=events,
            ids=ids,
            teacher_target=labels["target"][:, 0] if "target" in labels else None,
        )

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return float(-np.expm1(columns["tail"].astype(np.float64)).mean())

    def _check_vocabulary(self, vocabulary_size: int) -> None:
        if self.k > vocabulary_size:
            raise ValueError(
                f"labels.k is {self.k}, but the vocabulary has only V = {vocabulary_size} entries: write k: "
                f"{vocabulary_size} or less, or kind: dense"
            )

    def _encode_block(self, logits: torch.Tensor, target_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """float32 [n, V] -> columns, still wide."""
        values, ids = top_k(logits, self.k)
        values = values / self.temperature
        kept = values.logsumexp(1, keepdim=True)
        if self.k == logits.shape[1]:
            total, tail = kept, torch.full_like(kept, ABSENT)
        else:
            _, rest = rest_of(logits, ids, self.temperature)
            total = torch.logaddexp(kept, rest)
            tail = rest - total
        target = logits.gather(1, target_ids[:, None]) / self.temperature - total
        return {
            "tail": tail.clamp_(min=ABSENT),
            "target": target.clamp_(min=ABSENT),
            "ids": ids,
            "logprobs": (values - total).clamp_(min=ABSENT),
        }
