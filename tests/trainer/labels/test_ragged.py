"""Rows of different numbers of entries: padded in the worker, flat in a block, padded again for the student."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.labels import Labels
from trainer.errors import UnitRejected
from trainer.labels.encoding import Column, row_keys
from trainer.labels.ragged import flatten_ragged, padded, rows_of
from trainer.loop.packing import check_block, pack
from trainer.types import LabelHeader, Sequence, SoftLabelBlock, Unit

LAYOUT = (Column("logprobs", torch.float32, 4, counts="kept"), Column("kept", torch.uint16, 1))
KIND = ("main", "")
COUNTS = [[2], [0], [4], [1], [3]]


@pytest.fixture
def unit() -> Unit:
    masks = [np.array([True, True, False]), np.array([True, True, True, False])]
    return Unit("u", tuple(Sequence(str(i), np.arange(len(m), dtype=np.int32), m, "x") for i, m in enumerate(masks)))


def block_of(unit: Unit) -> tuple[np.ndarray, SoftLabelBlock]:
    """The padded entries [5, 4], and the block."""
    given = {"logprobs": np.arange(20, dtype=np.float32).reshape(5, 4), "kept": np.array(COUNTS, dtype=np.uint16)}
    header = LabelHeader("t", "1", Labels(kind="fake"), "f", 9, 3, "float32")
    offsets = np.array([0, 2, 5])
    return given["logprobs"], SoftLabelBlock(header, unit.tokens_hash(), flatten_ragged(given, LAYOUT), offsets)


def test_a_block_holds_the_counted_entries_alone_and_gives_the_rows_back(unit: Unit) -> None:
    entries, block = block_of(unit)
    expected = np.concatenate([entries[row, :count] for row, (count,) in enumerate(COUNTS)])
    assert block.columns["logprobs"].tolist() == expected.tolist()
    assert rows_of(block.columns, LAYOUT[0], 2, 4).tolist() == [8, 9, 10, 11, 12]
    again = padded(block.columns["logprobs"], block.columns["kept"])
    for row, (count,) in enumerate(COUNTS):
        assert again[row].tolist() == [*entries[row, :count], *[0.0] * (4 - count)]


def test_packed_rows_are_as_wide_as_the_longest_of_their_micro_batch(unit: Unit) -> None:
    entries, block = block_of(unit)
    check_block(unit, block, header=block.header, layout=LAYOUT)
    (first,) = pack([unit], [(0, 0)], [block], layouts={KIND: LAYOUT}).parts
    assert first.labels["logprobs"].tolist() == [[0, 1], [0, 0]]
    (both,) = pack([unit], [(0, 1), (0, 0)], [block], layouts={KIND: LAYOUT}).parts
    assert both.labels["kept"].tolist() == [[4], [1], [3], [2], [0]]
    assert both.labels["logprobs"][0].tolist() == entries[2].tolist()
    assert both.labels["logprobs"][2].tolist() == [16, 17, 18, 0]


def test_entries_that_do_not_add_up_are_refused(unit: Unit) -> None:
    _, block = block_of(unit)
    short = replace(block, columns={**block.columns, "logprobs": block.columns["logprobs"][1:]})
    with pytest.raises(UnitRejected, match="column logprobs has 9 entries, asked for 10"):
        check_block(unit, short, header=block.header, layout=LAYOUT)
    counts = np.array([[5], [0], [1], [1], [3]], dtype=np.uint16)
    with pytest.raises(UnitRejected, match="kept counts more than 4 entries of a row"):
        check_block(unit, replace(block, columns={**block.columns, "kept": counts}), header=block.header, layout=LAYOUT)


def test_the_key_of_a_row_is_that_of_its_text_and_place() -> None:
    text, rows = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([1, 3])
    keys = row_keys(text.int(), rows)
    assert keys.tolist() == row_keys(text, rows).tolist()
    assert keys[1] - keys[0] == 2
    assert not set(keys.tolist()) & set(row_keys(torch.tensor([3, 1, 4, 1, 6]), rows).tolist())
