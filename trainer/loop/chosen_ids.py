"""What a rank's student chose for steps that are not trained yet: kept until then, to hold labels against it, and in
checkpoints, because the weights that chose are gone by the time a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence

import numpy as np
import torch

from trainer.errors import UnitRejected
from trainer.types import RowIds, SoftLabelBlock, Unit, hash_tokens

IdsOfSequences = Mapping[str, np.ndarray]
"""By `hash_tokens` of one sequence: int32 [n, K]. Sequences and not units, which a resumed run may cut otherwise."""


class ChosenIds:
    """Used by `stage` in threads beside the steps; each of its methods does one thing to one entry."""

    def __init__(self) -> None:
        self._steps: dict[int, IdsOfSequences] = {}

    def keep(self, step: int, ids: IdsOfSequences) -> None:
        self._steps[step] = ids

    def knows(self, step: int, units: AbstractSequence[Unit]) -> bool:
        """Whether ids of all these units are kept."""
        known = self._steps.get(step, {})
        return all(hash_tokens([sequence]) in known for unit in units for sequence in unit.sequences)

    def of(self, step: int, unit: Unit) -> RowIds:
        known = self._steps[step]
        return RowIds(unit.tokens_hash(), np.concatenate([known[hash_tokens([s])] for s in unit.sequences]))

    def check(self, step: int, unit: Unit, block: SoftLabelBlock) -> None:
        """Raises `UnitRejected` unless the block's labels are of exactly the ids that were chosen for the unit."""
        if not self.knows(step, [unit]):
            raise UnitRejected(f"unit {unit.id}: labels of given ids have come, and this rank has chosen none for it")
        chosen = self.of(step, unit).ids
        wanted = np.where(chosen < 0, chosen[:, :1], chosen)  # as blocks hold rows with fewer ids
        found = block.columns["ids"][:, : wanted.shape[1]].astype(np.int32)
        if not np.array_equal(found, wanted):
            rows = np.flatnonzero((found != wanted).any(1)) if found.shape == wanted.shape else [0]
            raise UnitRejected(
                f"unit {unit.id}: its labels are of other ids than were asked for, first in row {int(rows[0])}"
            )

    def forget(self, step: int) -> None:
        """What was chosen up to a step, which is trained."""
        self._steps = {later: ids for later, ids in self._steps.items() if later > step}

    def state(self) -> dict[int, dict[str, torch.Tensor]]:
        return {step: {key: torch.from_numpy(one) for key, one in ids.items()} for step, ids in self._steps.items()}

    def restore(self, state: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        self._steps = {step: {key: one.numpy() for key, one in ids.items()} for step, ids in state.items()}
