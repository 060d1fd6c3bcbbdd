"""The ids that a student finds likeliest after each token, which a teacher is then asked about.

packed micro-batches of a step --forward, no gradient--> hidden [N, H] --head, in chunks--> likeliest ids [N, K]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from configs.labels import GivenIds
from configs.tasks import ResolvedTask
from trainer.loop.packing import pack, parts_of, to_device
from trainer.model.fast import cache_blocks, top_k
from trainer.model.head import Head, HeadShape
from trainer.model.load import HeadCall
from trainer.types import RankBatch, TokenBatch, hash_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """How a rank chooses, with the weights that its student has."""

    forward: Callable[[TokenBatch, HeadCall], tuple[torch.Tensor, ...]]  # of the sharded student
    head_shape: HeadShape
    vocabulary_size: int
    chunk_rows: int
    device: torch.device

    def ids(self, batch: RankBatch, tasks: Mapping[str, ResolvedTask]) -> dict[str, np.ndarray]:
        """Collective: one forward pass of each planned micro-batch, of which all ranks have as many. int32 [n, K] of
        each sequence whose labels take ids, by `hash_tokens`."""
        asked = {name: labels for name, task in tasks.items() if (labels := task.soft_labels) and labels.takes_ids}
        chosen: dict[str, np.ndarray] = {}
        for micro_batch in batch.micro_batches:
            packed = to_device(pack(batch.units, micro_batch, [None] * len(batch.units)), self.device)
            for places, ids in zip(parts_of(batch.units, micro_batch), self._of_parts(packed, asked), strict=True):
                sequences = [batch.units[u].sequences[s] for u, s in places]
                borders = np.cumsum([sequence.num_loss_tokens for sequence in sequences])[:-1]
                if sequences[0].task in asked:
                    rows = np.split(ids.cpu().numpy(), borders)
                    chosen |= {hash_tokens([s]): one.copy() for s, one in zip(sequences, rows, strict=True)}
        return chosen

    @torch.no_grad()
    def _of_parts(self, batch: TokenBatch, asked: Mapping[str, GivenIds]) -> tuple[torch.Tensor, ...]:
        """Of each part of a micro-batch its ids, or nothing where its labels take none."""

        def in_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            head = Head(weight, bias, self.head_shape, self.vocabulary_size)
            made = [
                likeliest_ids(
                    hidden[part.rows], head, batch.target_ids[part.rows], asked[part.task], chunk_rows=self.chunk_rows
                )
                if part.task in asked
                else hidden.new_empty(0)
                for part in batch.parts
            ]
            return (*made, hidden.new_empty(0))  # a forward gives at least one tensor

        return self.forward(batch, in_head)[:-1]


def likeliest_ids(
    hidden: torch.Tensor, head: Head, target_ids: torch.Tensor, labels: GivenIds, *, chunk_rows: int
) -> torch.Tensor:
    """int32 [n, num_given] of hidden states [n, H]: with `add_target` the target id, then the likeliest others and the
    control ids, k together; -1 at the end where the target is one of the control ids.

    All are of the vocabulary and different. One tensor [chunk_rows, V] exists at a time.
    """
    controls = torch.tensor(labels.control_ids, dtype=torch.int64, device=hidden.device)
    made = torch.empty(hidden.shape[0], labels.num_given, dtype=torch.int32, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_rows):
        chunk = slice(start, min(start + chunk_rows, hidden.shape[0]))
        products = head.product(hidden[chunk])
        for block in cache_blocks(products):
            place = slice(start + block.start, start + block.stop)
            logits = head.shape.apply(products[block].float())
            targets = target_ids[place, None][:, : int(labels.add_target)]
            always = controls.expand(len(logits), -1)
            others = logits.scatter(1, torch.cat([targets, always], dim=1), -torch.inf)
            count = labels.k - len(controls)
            likeliest = top_k(others, count)[1] if count else targets[:, :0]
            made[place] = torch.cat([targets, likeliest, _without(always, targets)], dim=1).int()
    return made


def _without(always: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Control ids [n, C] but for the row's target [n, 1 or 0], in whose place the row ends with -1."""
    repeated = (always[:, :, None] == targets[:, None, :]).any(2)
    order = repeated.int().argsort(dim=1, stable=True)
    return torch.where(repeated, -1, always).gather(1, order)
