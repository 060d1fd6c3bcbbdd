"""Ids that several teachers keep of the same rows, joined: on these each of them is asked for log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

import numpy as np

from configs.labels import GivenIds, Labels
from trainer.errors import UnitRejected
from trainer.types import RowIds, SoftLabelBlock, Unit


def row_ids(unit: Unit, encoding: Labels, given: AbstractSequence[RowIds | SoftLabelBlock | None]) -> RowIds | None:
    """What a request is given as an engine takes it: ids, or labels of the unit whose ids are joined. Raises
    `UnitRejected` for labels of other tokens."""
    blocks = [one for one in given if isinstance(one, SoftLabelBlock)]
    if not blocks:
        return given[0] if given else None
    assert isinstance(encoding, GivenIds), encoding
    if any(block.tokens_hash != unit.tokens_hash() for block in blocks):
        raise UnitRejected(f"unit {unit.id}: ids of other tokens were to be joined")
    return RowIds(unit.tokens_hash(), joined_ids([block.columns["ids"] for block in blocks], encoding.num_given))


def joined_ids(kept: AbstractSequence[np.ndarray], width: int) -> np.ndarray:
    """int32 [N, width]: of ids [N, K] of each teacher all that any has, each once and ascending, then -1.

    The same for every order of the teachers, so that each may join them by itself.
    """
    ids = np.sort(np.concatenate(kept, axis=1).astype(np.int32), axis=1)
    again = np.zeros(ids.shape, dtype=bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    last = np.iinfo(np.int32).max
    ids = np.sort(np.where(again, last, ids), axis=1)
    assert ids.shape[1] <= width, (ids.shape, width)
    ids = np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=last)
    return np.where(ids == last, -1, ids).astype(np.int32)
