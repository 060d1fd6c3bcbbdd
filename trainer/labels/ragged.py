"""Columns whose rows hold different numbers of entries: padded where tensors are, flat in a block.

    worker: padded [N, width] --flatten_ragged--> block: flat [R], counts [N, 1] --rows_of, padded--> part: [n, widest]

A block is what travels and what is kept, so it holds what was counted and nothing else; kernels want rectangles. Which
column counts the entries stands in `Column.counts`; what lies beyond a row's count means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence

import numpy as np

from trainer.labels.encoding import Column, numpy_dtype


def flatten_ragged(columns: Mapping[str, np.ndarray], layout: AbstractSequence[Column]) -> dict[str, np.ndarray]:
    """Columns [N, width] as a block holds them: of a ragged one the counted entries alone, [R]."""
    return {
        column.name: columns[column.name][_counted(columns[column.counts], column.width)]
        if column.counts
        else columns[column.name]
        for column in layout
    }


def rows_of(columns: Mapping[str, np.ndarray], column: Column, start: int, stop: int) -> np.ndarray:
    """The rows [start, stop) of a block's column: [stop - start, width], of a ragged one its entries, flat."""
    values = columns[column.name]
    if not column.counts:
        return values[start:stop]
    counts = columns[column.counts]
    first = int(counts[:start].sum(dtype=np.int64))
    return values[first : first + int(counts[start:stop].sum(dtype=np.int64))]


def padded(flat: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[n, largest count, at least 1] from the entries [R] of n rows and their counts [n, 1]; zeros beyond them."""
    made = np.zeros((len(counts), int(counts.max(initial=1))), dtype=flat.dtype)
    made[_counted(counts, made.shape[1])] = flat
    return made


def num_entries(columns: Mapping[str, np.ndarray], column: Column, num_rows: int) -> int:
    """How long a block's column of so many rows must be."""
    return int(columns[column.counts].sum(dtype=np.int64)) if column.counts else num_rows


def has_form(column: Column, values: np.ndarray | None) -> bool:
    """Whether a block's column is of the layout's dtype and width."""
    if values is None or values.dtype != numpy_dtype(column.dtype):
        return False
    return values.ndim == 1 if column.counts else values.ndim == 2 and values.shape[1] == column.width


def _counted(counts: np.ndarray, width: int) -> np.ndarray:
    """bool [N, width]: the entries that count."""
    return np.arange(width) < counts.reshape(-1, 1)
