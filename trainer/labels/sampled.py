"""Sampled labels: random draws from the teacher, whose shares are an unbiased estimate of all its probabilities.

Random-sampling knowledge distillation (RS-KD, arXiv 2503.16870). With n draws of which c_v fall on id v, the estimate
is p'_v = c_v / n, E[p'_v] = p_v, and zero at every id that was not drawn. So the gradient of forward_kl, q - p', is on
average that over the whole vocabulary, where that of top-k moves the tail as a whole. Control ids are not left to
chance: they have their exact probabilities, and the draws share what remains, P = 1 - sum over control ids of p:

    p'_v = p_v  for control ids,   p'_v = P c_v / n  for others

The draws are n equally spaced points in the cumulative distribution of the row, moved by one random number (systematic
sampling): c_v is n p_v / P rounded up or down, each with the chance that makes its mean exact. The variance of c_v is
at most 1/4, where that of independent draws is n p (1 - p). The random number is a hash of the text, the row and
`seed`, so that whoever scores the row again draws the same ids.

The value of forward_kl is - sum p' log q - H(p), with the teacher's own entropy, which travels along: unbiased too. No
other divergence is linear in p, and of log p' most is missing, so all others are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import Sampled
from trainer.labels.draws import NEARLY_ONE, Summary, distinct, draw
from trainer.labels.encoding import ABSENT, Column, TeacherShape, target_logits
from trainer.labels.kept import id_dtype, present_and_tail
from trainer.labels.sparse import count_dtype, ids_of, kept_mass
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head

Share = Callable[[torch.Tensor], tuple[list[torch.Tensor], int]]
"""Gives every shard of the vocabulary what each of them has, a float64 [n, w] of each in order, and its own place."""


class Encoding(Sampled):
    """Columns, all at `temperature`:

    `tail` float32 [N, 1], log-mass of the ids that were not drawn and are no control ids, for the report; `target`
    float32 [N, 1], log-probability of the target id; `entropy` float32 [N, 1], of the whole row in nats; `control`
    float32 [N, C], of the control ids, if there are any; `num_ids` [N, 1], different ids that were drawn; ragged,
    ascending: `ids` (uint16 where V <= 65536, else int32) and `draws` of each. Both counts are uint8 where there are
    at most 255 draws, else uint16.
    """

    needs: ClassVar[Literal["logits", "hidden"]] = "logits"

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        columns = (
            Column("tail", torch.float32, 1),
            Column("target", torch.float32, 1),
            Column("entropy", torch.float32, 1),
            *((Column("control", torch.float32, len(ids_of(self))),) if self.control_ids else ()),
            Column("ids", id_dtype(shape.vocabulary_size), self.draws, counts="num_ids"),
            Column("draws", count_dtype(self.draws), self.draws, counts="num_ids"),
            Column("num_ids", count_dtype(self.draws), 1),
        )
        return tuple(sorted(columns, key=lambda column: -column.dtype.itemsize))

    def encode(self, source: torch.Tensor, target_ids: torch.Tensor, row_keys: torch.Tensor) -> dict[str, torch.Tensor]:
        """From teacher logits [n, V] of any float dtype; `row_keys` int64 [n]."""
        shard = self.encode_shard(source, target_ids, 0, row_keys, lambda totals: ([totals], 0))
        return self.merge_shards([shard], source.shape[1])

    @property
    def shard_width(self) -> int:
        """Of what `encode_shard` makes."""
        return self.draws + 3 + len(self.control_ids)

    def encode_shard(
        self, source: torch.Tensor, target_ids: torch.Tensor, first_id: int, row_keys: torch.Tensor, share: Share
    ) -> torch.Tensor:
        """float32 [n, width]: what `merge_shards` needs of a shard's logits [n, v], the columns from `first_id` on.
        Each shard draws at those of the row's points that fall into its mass, which it knows when all have told theirs.
        """
        control = torch.tensor(ids_of(self), dtype=torch.int64, device=source.device)
        own = control[(control >= first_id) & (control < first_id + source.shape[1])] - first_id
        with torch.no_grad():
            summary = Summary.of(source, self.temperature, own, self.draws)
            told, shard = share(torch.cat([summary.log_sum, summary.groups.sum(1, keepdim=True)], dim=1))
            log_sums, masses = torch.stack(told, dim=2).unbind(1)  # [n, shards]
            total = log_sums.logsumexp(1, keepdim=True)
            weights = (log_sums - total).exp()
            points = torch.arange(self.draws, device=source.device) + uniform(row_keys, self.seed)[:, None]
            drawn, missed = draw(
                source, summary, _places(points / self.draws, weights * masses, shard), self.temperature, own
            )
            weight = weights[:, shard, None]
            asked = torch.cat([target_ids[:, None], control.expand(len(source), -1)], dim=1)
            logprobs = torch.cat([target_logits(source, one, first_id) for one in asked.unbind(1)], dim=1)
            numbers = [weight * (total - summary.mean), weight * missed, logprobs.double() / self.temperature - total]
            ids = torch.where(drawn < 0, -1, drawn + first_id).int().view(torch.float32)
            return torch.cat([ids, *(number.float() for number in numbers)], dim=1)

    def merge_shards(self, shards: AbstractSequence[torch.Tensor], vocabulary_size: int) -> dict[str, torch.Tensor]:
        """The columns of `encode`, from what `encode_shard` made of each shard of the vocabulary."""
        sizes = [self.draws, 1, 1, 1, len(self.control_ids)]
        drawn, entropy, missed, target, control = (
            torch.stack(parts) for parts in zip(*(shard.split(sizes, dim=1) for shard in shards), strict=True)
        )
        ids, draws, num_ids = distinct(drawn.contiguous().view(torch.int32).amax(0).long())
        made = {
            "tail": missed.sum(0).log().clamp_(min=ABSENT),
            "target": target.amax(0).clamp_(min=ABSENT),
            "entropy": entropy.sum(0),
            "control": control.amax(0).clamp_(min=ABSENT),
            "ids": ids,
            "draws": draws,
            "num_ids": num_ids,
        }
        layout = self.layout(TeacherShape(vocabulary_size, 0, torch.float32))
        return {column.name: made[column.name].to(column.dtype) for column in layout}

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        return labels

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None = None
    ) -> PairedLogProbs:
        """[n, C + K + 1] events: control ids, drawn ids, everything else, of which the estimate is zero."""
        ids, present, teacher = self._events(labels, logits.dtype)
        teacher = torch.cat([teacher, teacher.new_full((len(teacher), 1), ABSENT)], dim=1)
        events, ids = present_and_tail(logits, ids, self.temperature, present)
        return PairedLogProbs(
            events.log_softmax(1),
            teacher.log_softmax(1),
            exhaustive=False,
            student_scores=events,
            ids=ids,
            teacher_entropy=labels["entropy"][:, 0].to(logits.dtype),
        )

    def estimate(self, labels: Mapping[str, torch.Tensor], vocabulary_size: int) -> torch.Tensor:
        """float32 [n, V]: p', of columns."""
        ids, _, logprobs = self._events(labels, torch.float32)
        return torch.zeros(len(ids), vocabulary_size, device=ids.device).scatter_add_(1, ids, logprobs.exp())

    def _events(
        self, labels: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, whether a row has them, and log p' [n, C + K]: `ABSENT` where a row has none."""
        draws = labels["draws"].to(dtype)
        present = torch.arange(draws.shape[1], device=draws.device) < labels["num_ids"].long()
        ids, logprobs = labels["ids"].long(), draws.log() - math.log(self.draws)
        if self.control_ids:
            control = labels["control"].to(dtype)
            left = 1.0 - control.exp().sum(1, keepdim=True)
            logprobs = torch.cat([control, logprobs + left.clamp(min=0.0).log()], dim=1)
            first = torch.tensor(ids_of(self), device=ids.device).expand(len(ids), -1)
            ids = torch.cat([first, ids], dim=1)
            present = torch.cat([torch.ones_like(first, dtype=torch.bool), present], dim=1)
        return ids, present, logprobs.clamp(min=ABSENT).masked_fill(~present, ABSENT)

    def entropy(self, columns: Mapping[str, np.ndarray]) -> float | None:
        """The teacher's, of all ids."""
        return float(columns["entropy"].mean()) if len(columns["entropy"]) else None

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return kept_mass(columns["tail"])


def _places(points: torch.Tensor, masses: torch.Tensor, shard: int) -> torch.Tensor:
    """float64 [n, m]: where ascending points in [0, 1), shares of the mass of all shards [n, shards], are in that of
    one of them; -1 where they are in another's. All shards compute the same borders, so that one of them has each; none
    where control ids hold all mass that float32 can tell."""
    nothing = masses.sum(1, keepdim=True) < torch.finfo(torch.float32).tiny
    borders = masses.masked_fill(nothing, 0.0).cumsum(1)
    at = points * borders[:, -1:]
    end = borders[:, shard, None]
    start = borders[:, shard - 1, None] if shard else torch.zeros_like(end)
    inside = (at >= start) & (at < end)
    return torch.where(inside, ((at - start) / masses[:, shard, None]).clamp(0.0, NEARLY_ONE), -1.0)


def uniform(keys: torch.Tensor, seed: int) -> torch.Tensor:
    """float64 [n] in [0, 1), multiples of 2^-32: splitmix64 (Steele et al., OOPSLA 2014) of keys int64 [n] and a seed,
    the same on every device."""
    z = keys + _signed(0x9E3779B97F4A7C15 * (seed + 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 32).double() / 2**32


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, zeros coming in: torch's own shift repeats the sign."""
    return (z >> by) & (2 ** (64 - by) - 1)


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
