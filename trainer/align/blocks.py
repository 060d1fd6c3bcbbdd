"""The labels of a teacher's rows as labels of the student's rows."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import replace

import numpy as np
import torch

from trainer.labels.encoding import ALIGNED, Column
from trainer.types import Reading, SoftLabelBlock, Unit

ALIGNED_COLUMN = Column(ALIGNED, torch.float32, 1)


def to_student_rows(unit: Unit, block: SoftLabelBlock) -> SoftLabelBlock:
    """A block of `unit.as_read()` as one of the unit itself, with the column `ALIGNED`; where nothing of it is aligned
    the block as it is. Columns are those of one row each, as `configs/alignment.py` allows."""
    readings = [sequence.reading for sequence in unit.sequences]
    if None in readings:
        assert not any(readings), unit.id
        return block
    borders = block.row_offsets
    parts = [_part(block, int(start), one) for start, one in zip(borders[:-1], readings, strict=True) if one]
    return replace(
        block,
        tokens_hash=unit.tokens_hash(),
        columns={name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        row_offsets=np.cumsum([0, *(len(part[ALIGNED]) for part in parts)]),
    )


def _part(block: SoftLabelBlock, start: int, reading: Reading) -> dict[str, np.ndarray]:
    """The columns of one sequence by the student's rows: of several rows of a group the first has the sum."""
    found = np.flatnonzero(reading.groups >= 0)
    if reading.chunked:
        summed = np.zeros(reading.num_groups)
        ((name, values),) = block.columns.items()  # of `labels: token`
        rows = values[start : start + len(reading.teacher_groups), 0]
        np.add.at(summed, reading.teacher_groups, rows.astype(np.float64))
        _, first = np.unique(reading.groups[found], return_index=True)
        columns = {name: np.zeros((len(reading.groups), 1), dtype=np.float32)}
        columns[name][found[first], 0] = summed
    else:
        source = start + reading.groups[found]
        columns = {}
        for name, values in block.columns.items():
            columns[name] = np.zeros((len(reading.groups), *values.shape[1:]), dtype=values.dtype)
            columns[name][found] = values[source]
    columns[ALIGNED] = (reading.groups >= 0).astype(np.float32)[:, None]
    return columns


def chunk_numbers(readings: AbstractSequence[Reading]) -> tuple[np.ndarray, int]:
    """(int64 [n], C): of each loss row of some sequences the number of its chunk, C for those in none, and how many
    chunks there are."""
    total = sum(reading.num_groups for reading in readings)
    numbers, before = [], 0
    for reading in readings:
        numbers.append(np.where(reading.groups >= 0, reading.groups + before, total))
        before += reading.num_groups
    return np.concatenate(numbers), total
