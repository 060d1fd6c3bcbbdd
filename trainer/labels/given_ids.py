"""Given-ids labels: the teacher's log-probabilities on ids that somebody else chose, row by row, and the log-mass of
everything else.

The pair is over the given ids and one lumped tail, as that of top-k, and a lower bound of every divergence over the
vocabulary. Which bound is tight depends on whose ids they are: reverse_kl is a sum weighted by the student's
probabilities, so the student's own likeliest ids hold nearly all of it, while the teacher's may miss most of it. Where
student and teacher agree on what is unlikely, nothing is lost with either.

Correctness does not depend on how old the ids are: any ids are a support, and what they miss is in the tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import GivenIds
from trainer.labels.encoding import ABSENT, Column, TeacherShape
from trainer.labels.kept import id_dtype, kept_layout, kept_pair, present_and_tail, rest_of
from trainer.labels.sparse import kept_entropy, kept_mass
from trainer.model.fast import cache_blocks, top_k
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head


class Encoding(GivenIds):
    """Columns, all at `temperature` and relative to the log-sum-exp over the whole vocabulary:

    `tail` float32 [N, 1], log-mass of the ids not kept; `target` float32 [N, 1], log-probability of the target
    id; `ids` uint16 [N, K] where V <= 65536, else int32, as they were given, then what the teacher adds; `logprobs`
    float16 [N, K] of these ids, rounded by at most 2^-11 of their size: 0.008 nats down to -32.

    A row of which fewer ids were given has its first id again in their place, with log-probability `ABSENT`.
    """

    needs: ClassVar[Literal["logits", "hidden"]] = "logits"

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        """Raises `ValueError` where a row would hold more ids than there are."""
        self._check_vocabulary(shape.vocabulary_size)
        return kept_layout(self.num_kept, shape)

    def encode(
        self, source: torch.Tensor, target_ids: torch.Tensor, given_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """From teacher logits [n, V] of any float dtype. `given_ids` int [n, num_given]: different ids of V, the first
        one always an id, then -1 from where a row has no more."""
        n, v = source.shape
        self._check_vocabulary(v)
        columns = {
            "tail": source.new_empty(n, 1, dtype=torch.float32),
            "target": source.new_empty(n, 1, dtype=torch.float32),
            "ids": source.new_empty(n, self.num_kept, dtype=id_dtype(v)),
            "logprobs": source.new_empty(n, self.num_kept, dtype=torch.float16),
        }
        with torch.no_grad():
            for block in cache_blocks(source):
                ids = without_gaps(given_ids[block].long())
                made = self._encode_block(source[block].float(), target_ids[block], ids)
                for name, values in made.items():
                    columns[name][block] = values.to(columns[name].dtype)
        return columns

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        return labels

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None = None
    ) -> PairedLogProbs:
        """[n, K + 1] events, the tail last; an id that was not given is an event of probability 0 on both sides. The
        teacher's are its columns, renormalised: that removes the float16 rounding of `logprobs` and nothing else, since
        the mass of kept ids and tail is one."""
        teacher = torch.cat([labels["logprobs"].to(logits.dtype), labels["tail"].to(logits.dtype)], dim=1)
        ids = labels["ids"].long()
        events, ids = present_and_tail(logits, ids, self.temperature, ~_repeated(ids))
        return kept_pair(events, teacher, ids, labels)

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return kept_mass(columns["tail"])

    def entropy(self, columns: Mapping[str, np.ndarray]) -> float | None:
        return kept_entropy(columns["logprobs"], columns["tail"])

    def _check_vocabulary(self, vocabulary_size: int) -> None:
        if self.num_kept > vocabulary_size:
            raise ValueError(
                f"labels keep {self.num_kept} ids of a row (k: {self.k}, add_target: {str(self.add_target).lower()}, "
                f"add_teacher_topk: {self.add_teacher_topk}), but the vocabulary has only V = {vocabulary_size} "
                "entries: write a smaller k, or kind: hidden"
            )

    def _encode_block(
        self, logits: torch.Tensor, target_ids: torch.Tensor, ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """float32 [n, V] -> columns, still wide. `ids` int64 [n, num_given], without gaps."""
        lowest = torch.finfo(logits.dtype).min
        if self.add_teacher_topk:
            ids = torch.cat([ids, top_k(logits.scatter(1, ids, lowest), self.add_teacher_topk)[1]], dim=1)
        absent = _repeated(ids)
        values = (logits.gather(1, ids) / self.temperature).masked_fill_(absent, lowest)
        kept = values.logsumexp(1, keepdim=True)
        _, rest = rest_of(logits, ids, self.temperature)
        total = torch.logaddexp(kept, rest)
        target = logits.gather(1, target_ids[:, None]) / self.temperature - total
        return {
            "tail": (rest - total).clamp_(min=ABSENT),
            "target": target.clamp_(min=ABSENT),
            "ids": ids,
            "logprobs": (values - total).clamp_(min=ABSENT),
        }


def without_gaps(given_ids: torch.Tensor) -> torch.Tensor:
    """The first id of each row in place of every -1."""
    return torch.where(given_ids < 0, given_ids[:, :1], given_ids)


def _repeated(ids: torch.Tensor) -> torch.Tensor:
    """bool [n, K]: where a row has its first id again."""
    repeated = ids == ids[:, :1]
    repeated[:, 0] = False
    return repeated
