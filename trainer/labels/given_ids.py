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
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import GivenIds
from trainer.labels.encoding import ABSENT, Column, TeacherShape, target_logits
from trainer.labels.kept import kept_layout, kept_pair, present_and_tail
from trainer.labels.sparse import Kept, kept_entropy, kept_mass
from trainer.model.fast import log_sum_exp_without, top_k
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
        self._check_vocabulary(source.shape[1])
        shard = self.encode_shard(source, target_ids, 0, given_ids)
        return self.merge_shards([shard], source.shape[1])

    @property
    def shard_width(self) -> int:
        """Of what `encode_shard` makes."""
        return 2 * self.num_kept + 2

    def encode_shard(
        self, source: torch.Tensor, target_ids: torch.Tensor, first_id: int, given_ids: torch.Tensor
    ) -> torch.Tensor:
        """float32 [n, width]: what `merge_shards` needs of a shard's logits [n, v], the columns from `first_id` on. Ids
        that another shard has are -1."""
        with torch.no_grad():
            ids = given_ids.long() - first_id
            ids = torch.where((given_ids >= 0) & (ids >= 0) & (ids < source.shape[1]), ids, -1)
            if self.add_teacher_topk:
                ids = torch.cat([ids, _likeliest_others(source, ids, self.add_teacher_topk)], dim=1)
            values = source.gather(1, ids.clamp(min=0)).float().masked_fill(ids < 0, -torch.inf)
            kept = Kept(
                ids=torch.where(ids < 0, -1, ids + first_id),
                values=values / self.temperature,
                rest=_rest(source, ids, self.temperature),
                target=target_logits(source, target_ids, first_id) / self.temperature,
            )
            return kept.to_wire(self.num_kept)

    def merge_shards(self, shards: AbstractSequence[torch.Tensor], vocabulary_size: int) -> dict[str, torch.Tensor]:
        """The columns of `encode`, from what `encode_shard` made of each shard of the vocabulary."""
        with torch.no_grad():
            made = self._columns_of([Kept.of_wire(shard) for shard in shards])
            layout = self.layout(TeacherShape(vocabulary_size, 0, torch.float32))
            return {column.name: made[column.name].to(column.dtype) for column in layout}

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

    def _columns_of(self, shards: AbstractSequence[Kept]) -> dict[str, torch.Tensor]:
        """Still wide."""
        given, more = self.num_given, self.add_teacher_topk
        ids = without_gaps(torch.stack([shard.ids[:, :given] for shard in shards]).amax(0))
        values = torch.stack([shard.values[:, :given] for shard in shards]).amax(0)
        rest = [shard.rest for shard in shards]
        if more:
            others, theirs = (
                torch.cat(parts, 1)
                for parts in zip(*((s.ids[:, given:], s.values[:, given:]) for s in shards), strict=True)
            )
            theirs, order = theirs.sort(1, descending=True)
            ids = torch.cat([ids, others.gather(1, order[:, :more])], dim=1)
            values = torch.cat([values, theirs[:, :more]], dim=1)
            rest.append(theirs[:, more:])
        outside = torch.cat(rest, dim=1).logsumexp(1, keepdim=True)
        total = torch.logaddexp(values.logsumexp(1, keepdim=True), outside)
        target = torch.stack([shard.target for shard in shards]).amax(0)
        return {
            "tail": (outside - total).clamp_(min=ABSENT),
            "target": (target - total).clamp_(min=ABSENT),
            "ids": ids,
            "logprobs": (values - total).clamp_(min=ABSENT),
        }


def without_gaps(given_ids: torch.Tensor) -> torch.Tensor:
    """The first id of each row in place of every -1."""
    return torch.where(given_ids < 0, given_ids[:, :1], given_ids)


def _likeliest_others(logits: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [n, count]: columns of logits [n, v] with the largest of each row, largest first, but for `ids` [n, K]; -1
    where a shard has no more."""
    found = top_k(logits, min(count + ids.shape[1], logits.shape[1]))[1]
    given = (found[:, :, None] == ids[:, None, :]).any(2)
    order = given.byte().argsort(dim=1, stable=True)[:, :count]
    found = torch.where(given, -1, found).gather(1, order)
    return torch.nn.functional.pad(found, (0, count - found.shape[1]), value=-1)


def _rest(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """float32 [n, 1]: log-sum-exp of all columns but `ids` [n, K], of which those that are -1 mean none."""
    present = ids >= 0
    first = ids.gather(1, present.byte().argmax(1, keepdim=True)).clamp(min=0)
    rest = log_sum_exp_without(logits, torch.where(present, ids, first), temperature)
    left_out = logits.gather(1, first).float() / temperature
    return torch.where(present.any(1, keepdim=True), rest, torch.logaddexp(rest, left_out))


def _repeated(ids: torch.Tensor) -> torch.Tensor:
    """bool [n, K]: where a row has its first id again."""
    repeated = ids == ids[:, :1]
    repeated[:, 0] = False
    return repeated
