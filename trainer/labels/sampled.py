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
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import Sampled
from trainer.labels.encoding import ABSENT, Column, TeacherShape
from trainer.labels.kept import id_dtype, present_and_tail
from trainer.labels.sparse import count_dtype, ids_of, kept_mass
from trainer.model.fast import cache_blocks
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head


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
        layout = self.layout(TeacherShape(source.shape[1], 0, torch.float32))
        columns = {column.name: source.new_empty(len(source), column.width, dtype=column.dtype) for column in layout}
        offsets = uniform(row_keys, self.seed)
        with torch.no_grad():
            for block in cache_blocks(source):
                made = self._encode_block(source[block].float(), target_ids[block], offsets[block])
                for name, values in made.items():
                    columns[name][block] = values.to(columns[name].dtype)
        return columns

    def _encode_block(
        self, logits: torch.Tensor, target_ids: torch.Tensor, offsets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        logprobs = (logits / self.temperature).log_softmax(1)
        p = logprobs.exp()
        entropy = -(p * logprobs.clamp(min=ABSENT)).sum(1, keepdim=True)
        control = torch.tensor(ids_of(self), dtype=torch.int64, device=logits.device)
        p[:, control] = 0.0
        ids, draws, num_ids = _draw(p, offsets, self.draws)
        missed = p.scatter_(1, ids, 0.0).sum(1, keepdim=True)
        made = {
            "tail": missed.log().clamp_(min=ABSENT),
            "target": logprobs.gather(1, target_ids[:, None]).clamp_(min=ABSENT),
            "entropy": entropy,
            "ids": ids,
            "draws": draws,
            "num_ids": num_ids,
        }
        return made | ({"control": logprobs[:, control].clamp_(min=ABSENT)} if len(control) else {})

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


def _draw(p: torch.Tensor, offsets: torch.Tensor, num_draws: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Different ids [n, num_draws] in ascending order, draws of each, and how many there are [n, 1]; of weights
    p [n, V] that need not sum to one. Beyond its number a row repeats its first id, with no draws.

    float64 sums: in float32 an id of 1e-8 would vanish beside a sum near 1.
    """
    sums = p.cumsum(1, dtype=torch.float64)
    steps = torch.arange(num_draws, device=p.device, dtype=torch.float64)
    points = (steps + offsets[:, None]) / num_draws * sums[:, -1:]
    drawn = torch.searchsorted(sums, points, right=True).clamp_(max=p.shape[1] - 1)
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    places = new.cumsum(1) - 1
    num_ids = torch.where(sums[:, -1:] > 0, places[:, -1:] + 1, 0)  # none where control ids hold all mass
    ids = drawn[:, :1].expand_as(drawn).scatter(1, places, drawn)
    draws = torch.zeros_like(drawn).scatter_add_(1, places, torch.ones_like(drawn))
    return ids, draws, num_ids


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
