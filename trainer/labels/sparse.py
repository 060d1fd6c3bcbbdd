"""The likeliest ids of each row and what all others weigh, of a whole vocabulary or of its shards; the student's side
is `trainer/labels/kept.py`.

    teacher logits [n, V] --keep--> Kept: ids, their logits, log-sum-exp of the rest --> columns of an encoding
    a shard [n, V / shards] --keep--> Kept --to_wire--> gathered --of_wire, merge--> the same Kept
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch.nn import functional

from configs.labels import Sparse
from trainer.labels.encoding import Column, TeacherShape, target_logits
from trainer.model.fast import log_sum_exp_without, top_k

if TYPE_CHECKING:
    from trainer.model.head import Head


@dataclass(frozen=True, slots=True)
class Kept:
    """Of n rows: all at the temperature, unnormalised, float32."""

    ids: torch.Tensor  # int64 [n, K], most probable first
    values: torch.Tensor  # [n, K] logits of the ids
    rest: torch.Tensor  # [n, 1] log-sum-exp of all other ids, -inf where there is none
    target: torch.Tensor  # [n, 1] logit of the target id, -inf where another shard has it

    @property
    def total(self) -> torch.Tensor:
        """[n, 1]: log-sum-exp of all ids."""
        return torch.logaddexp(self.values.logsumexp(1, keepdim=True), self.rest)

    def to_wire(self, width: int) -> torch.Tensor:
        """float32 [n, 2 width + 2], ids as their bits: one tensor, for one collective. Empty places have id -1."""
        n, k = self.ids.shape
        ids = self.ids.new_full((n, width), -1, dtype=torch.int32)
        ids[:, :k] = self.ids
        values = self.values.new_full((n, width), -torch.inf)
        values[:, :k] = self.values
        return torch.cat([ids.view(torch.float32), values, self.rest, self.target], dim=1)

    @classmethod
    def of_wire(cls, wire: torch.Tensor) -> Kept:
        width = (wire.shape[1] - 2) // 2
        ids, values, rest, target = wire.split([width, width, 1, 1], dim=1)
        return cls(ids.contiguous().view(torch.int32).long(), values, rest, target)


def keep(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    k: int,
    temperature: float,
    control_ids: AbstractSequence[int] = (),
    first_id: int = 0,
) -> Kept:
    """The k likeliest ids of logits [n, v] of any dtype, or all, with the control ids in the place of the least likely
    of them. `first_id` is that of the first column: a shard keeps what it has."""
    n, v = logits.shape
    values, ids = top_k(logits, min(k, v))
    own = [i - first_id for i in control_ids if first_id <= i < first_id + v]
    if own:
        control = torch.tensor(own, device=logits.device)
        both = torch.cat([ids, control.expand(n, -1)], dim=1), torch.cat([values, logits[:, control]], dim=1)
        doubled = functional.pad(torch.isin(ids, control), (0, len(own)))
        ids, values = _likeliest(*both, min(k, v), control, absent=doubled)
    rest = log_sum_exp_without(logits, ids, temperature)
    target = target_logits(logits, target_ids, first_id)
    return Kept(ids + first_id, values.float() / temperature, rest, target / temperature)


def merge(shards: AbstractSequence[Kept], *, k: int, control_ids: AbstractSequence[int] = ()) -> Kept:
    """What `keep` makes of the whole vocabulary, from what it made of each of its shards."""
    ids, values = (torch.cat(parts, dim=1) for parts in zip(*((s.ids, s.values) for s in shards), strict=True))
    control = torch.tensor(list(control_ids), dtype=torch.int64, device=ids.device)
    kept = _likeliest(ids, values, min(k, ids.shape[1]), control, absent=ids < 0)
    dropped = ~(ids[:, :, None] == kept[0][:, None, :]).any(2)
    rest = [s.rest for s in shards] + [values.masked_fill(~dropped, -torch.inf)]
    target = torch.cat([s.target for s in shards], dim=1).amax(1, keepdim=True)
    return Kept(*kept, torch.cat(rest, dim=1).logsumexp(1, keepdim=True), target)


def _likeliest(
    ids: torch.Tensor, values: torch.Tensor, k: int, control: torch.Tensor, *, absent: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The control ids and the likeliest others, k together, of candidates [n, c]; most probable first. A candidate that
    is `absent` is chosen last: even ids of probability zero come before."""
    order = values.clamp(min=torch.finfo(values.dtype).min)
    order = order.masked_fill(torch.isin(ids, control), torch.inf).masked_fill(absent, -torch.inf)
    chosen = order.topk(k, dim=1).indices
    ids, values = ids.gather(1, chosen), values.gather(1, chosen)
    values, places = values.sort(1, descending=True)
    return ids.gather(1, places), values


class KeptIds(Sparse):
    """Base of encodings made of `Kept`: the likeliest ids of each row, and what all others weigh."""

    needs: ClassVar[Literal["logits", "hidden"]] = "logits"

    @property
    def most_ids(self) -> int:
        """Kept of a row, at most."""
        return getattr(self, self.most)

    @property
    def shard_width(self) -> int:
        """Of what `encode_shard` makes."""
        return 2 * self.most_ids + 2

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        raise NotImplementedError

    def columns_of(self, kept: Kept) -> dict[str, torch.Tensor]:
        """Columns of n rows, still wide."""
        raise NotImplementedError

    def encode(self, source: torch.Tensor, target_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """From teacher logits [n, V] of any float dtype."""
        with torch.no_grad():
            return self._narrow(self._keep(source, target_ids), source.shape[1])

    def encode_shard(self, source: torch.Tensor, target_ids: torch.Tensor, first_id: int) -> torch.Tensor:
        """float32 [n, width]: what `merge_shards` needs of a shard's logits [n, v], the columns from `first_id` on."""
        with torch.no_grad():
            return self._keep(source, target_ids, first_id).to_wire(self.most_ids)

    def merge_shards(self, shards: AbstractSequence[torch.Tensor], vocabulary_size: int) -> dict[str, torch.Tensor]:
        """The columns of `encode`, from what `encode_shard` made of each shard of the vocabulary."""
        k = min(self.most_ids, vocabulary_size)
        with torch.no_grad():
            kept = merge([Kept.of_wire(shard) for shard in shards], k=k, control_ids=ids_of(self))
            return self._narrow(kept, vocabulary_size)

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        return labels

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return kept_mass(columns["tail"])

    def entropy(self, columns: Mapping[str, np.ndarray]) -> float | None:
        return kept_entropy(columns["logprobs"], columns["tail"])

    def _keep(self, logits: torch.Tensor, target_ids: torch.Tensor, first_id: int = 0) -> Kept:
        return keep(
            logits,
            target_ids,
            k=self.most_ids,
            temperature=self.temperature,
            control_ids=ids_of(self),
            first_id=first_id,
        )

    def _narrow(self, kept: Kept, vocabulary_size: int) -> dict[str, torch.Tensor]:
        """The columns in the layout's order and dtypes."""
        made = self.columns_of(kept)
        layout = self.layout(TeacherShape(vocabulary_size, 0, torch.float32))
        return {column.name: made[column.name].to(column.dtype) for column in layout}


def ids_of(labels: Sparse) -> tuple[int, ...]:
    """Its control ids. Raises `ValueError` where they are still names (`trainer/loop/control_ids.py` replaces them)."""
    if labels.control_ids == "auto" or not all(isinstance(one, int) for one in labels.control_ids):
        raise ValueError(f"labels.control_ids: {labels.control_ids!r} are no ids yet: no tokenizer has read them")
    return labels.control_ids


def count_dtype(most: int) -> torch.dtype:
    return torch.uint8 if most < 2**8 else torch.uint16


def kept_mass(tail: np.ndarray) -> float:
    """Mean mass of the kept ids, from the log-mass of all others [N, 1]."""
    return float(-np.expm1(tail.astype(np.float64)).mean())


def kept_entropy(logprobs: np.ndarray, tail: np.ndarray) -> float | None:
    """Mean entropy of the kept ids and of all others as one event, a lower bound of that of the vocabulary: from the
    log-probabilities of all rows, in any shape, and the log-mass of the others [N, 1]; None of no row."""
    if not len(tail):
        return None
    events = [values.astype(np.float32) for values in (logprobs, tail)]
    return float(-sum((np.exp(values) * values).sum(dtype=np.float64) for values in events) / len(tail))
