"""Nucleus labels: the likeliest ids of each row until they hold the mass p together, at most k_max; ragged.

As top-k (`trainer/labels/topk.py`) but for how many ids: a row of which the teacher is sure costs a few bytes, and one
where it is not keeps what matters (the set is that of nucleus sampling, arXiv 1904.09751). The pair is over the kept
ids and one lumped tail, so every divergence is a lower bound of the one over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from configs.labels import Nucleus
from trainer.labels.encoding import ABSENT, Column, TeacherShape
from trainer.labels.kept import id_dtype, kept_pair, present_and_tail
from trainer.labels.sparse import Kept, KeptIds, count_dtype, ids_of
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head


class Encoding(Nucleus, KeptIds):
    """Columns, all at `temperature` and relative to the log-sum-exp over the whole vocabulary:

    `tail` float32 [N, 1], log-mass of the ids not kept; `target` float32 [N, 1], log-probability of the target id;
    `num_ids` uint8 [N, 1] (uint16 where k_max > 255), at least 1; ragged: `ids` uint16 where V <= 65536, else int32,
    most probable first; `logprobs` float16 of these ids, within 0.004 nats above -16. Control ids are kept first of
    all, and count for the mass and for k_max.
    """

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        width = min(self.k_max, shape.vocabulary_size)
        columns = (
            Column("tail", torch.float32, 1),
            Column("target", torch.float32, 1),
            Column("ids", id_dtype(shape.vocabulary_size), width, counts="num_ids"),
            Column("logprobs", torch.float16, width, counts="num_ids"),
            Column("num_ids", count_dtype(self.k_max), 1),
        )
        return tuple(sorted(columns, key=lambda column: -column.dtype.itemsize))

    def columns_of(self, kept: Kept) -> dict[str, torch.Tensor]:
        total = kept.total
        logprobs = kept.values - total
        present = self._present(kept.ids, logprobs.exp())
        dropped = kept.values.masked_fill(present, -torch.inf).logsumexp(1, keepdim=True)
        ids = kept.ids
        if self.control_ids:  # else those that are present come first already
            order = (~present).byte().argsort(dim=1, stable=True)
            ids, logprobs = ids.gather(1, order), logprobs.gather(1, order)
        return {
            "tail": (torch.logaddexp(kept.rest, dropped) - total).clamp_(min=ABSENT),
            "target": (kept.target - total).clamp_(min=ABSENT),
            "ids": ids,
            "logprobs": logprobs.clamp_(min=ABSENT),
            "num_ids": present.sum(1, keepdim=True),
        }

    def _present(self, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """bool [n, K] of candidates, the likeliest first: an id is kept while those before it, and the control ids,
        hold less than p."""
        if self.p == 1.0:
            return torch.ones_like(ids, dtype=torch.bool)
        control = torch.isin(ids, torch.tensor(ids_of(self), dtype=torch.int64, device=ids.device))
        others = p.masked_fill(control, 0.0)
        before = others.cumsum(1) - others + (p - others).sum(1, keepdim=True)
        return control | (before < self.p)

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None = None
    ) -> PairedLogProbs:
        """[n, K + 1] events, the tail last, those beyond a row's number of ids without mass on either side."""
        logprobs = labels["logprobs"].to(logits.dtype)
        present = torch.arange(logprobs.shape[1], device=logits.device) < labels["num_ids"].long()
        teacher = torch.cat([logprobs.masked_fill(~present, ABSENT), labels["tail"].to(logits.dtype)], dim=1)
        events, ids = present_and_tail(logits, labels["ids"].long(), self.temperature, present)
        return kept_pair(events, teacher, ids, labels)
