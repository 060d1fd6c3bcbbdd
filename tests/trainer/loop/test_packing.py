"""Packing against a loop over sequences, and what a block must be to be trained on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from configs.labels import Labels
from trainer.errors import UnitRejected
from trainer.labels.encoding import Column, TeacherShape
from trainer.loop.packing import check_block, check_finite, layout_of, pack, to_device
from trainer.types import LabelHeader, Sequence, SoftLabelBlock, Unit

HEADER = LabelHeader(
    teacher="t",
    weights_version="1",
    encoding=Labels(kind="fake"),
    tokenizer_fingerprint="f",
    vocabulary_size=9,
    hidden_size=3,
    dtype="bfloat16",
)
KIND = ("main", "")


@dataclasses.dataclass(frozen=True)
class FakeEncoding:
    """A hidden-state column in the teacher's dtype beside 16-bit ids."""

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        return (Column("hidden", shape.dtype, shape.hidden_size), Column("ids", torch.uint16, 2))


LAYOUT = FakeEncoding().layout(TeacherShape(9, 3, torch.bfloat16))


def _sequence(name: str, length: int, rows: tuple[int, ...]) -> Sequence:
    mask = np.zeros(length, dtype=bool)
    mask[list(rows)] = True
    ids = (np.arange(length) * 7 + len(name)).astype(np.int32)
    return Sequence(prompt_id=name, token_ids=ids, loss_mask=mask, author="dataset")


def _unit(name: str, *sequences: Sequence) -> Unit:
    return Unit(id=name, sequences=sequences)


def _block(unit: Unit, *, start: float = 0.0) -> SoftLabelBlock:
    offsets = np.cumsum([0, *(s.num_loss_tokens for s in unit.sequences)])
    hidden = torch.arange(offsets[-1] * 3, dtype=torch.float32).view(-1, 3).add(start).to(torch.bfloat16)
    ids = np.arange(offsets[-1] * 2, dtype=np.uint16).reshape(-1, 2)
    columns = {"hidden": hidden.view(torch.uint16).numpy(), "ids": ids}
    for column in columns.values():
        column.setflags(write=False)  # as the object store hands them out
    return SoftLabelBlock(header=HEADER, tokens_hash=unit.tokens_hash(), columns=columns, row_offsets=offsets)


@pytest.fixture
def units() -> tuple[Unit, ...]:
    return (
        _unit("u0", _sequence("a", 5, (1, 2, 3)), _sequence("bb", 3, ())),
        _unit("u1", _sequence("ccc", 4, (0, 2)), _sequence("dddd", 2, (0,))),
    )


def test_a_micro_batch_is_its_sequences_one_after_another(units: tuple[Unit, ...]) -> None:
    blocks = [_block(units[0]), _block(units[1], start=100.0)]
    layout = layout_of(FakeEncoding(), blocks[0])
    batch = pack(units, ((1, 0), (0, 1), (0, 0)), blocks, layouts={KIND: layout})
    tokens, positions, rows, following = [], [], [], []
    for u, s in ((1, 0), (0, 1), (0, 0)):
        sequence = units[u].sequences[s]
        for i in range(sequence.num_tokens):
            if sequence.loss_mask[i]:
                rows.append(len(tokens))
                following.append(int(sequence.token_ids[i + 1]))
            tokens.append(int(sequence.token_ids[i]))
            positions.append(i)
    assert batch.token_ids.tolist() == [tokens]
    assert batch.position_ids.tolist() == [positions]
    assert batch.sequence_offsets == (0, 4, 7, 12)
    assert batch.loss_rows.tolist() == rows
    assert batch.target_ids.tolist() == following
    (part,) = batch.parts
    assert (part.task, part.rows, part.groups) == ("main", slice(0, 5), ((0,), (1,), (2,)))
    assert part.row_sequences.tolist() == [0, 0, 2, 2, 2]
    assert part.row_weights is None
    assert part.labels["hidden"].dtype is torch.bfloat16
    assert part.labels["hidden"][:, 0].tolist() == [100, 103, 0, 3, 6]
    assert part.labels["ids"].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [4, 5]]
    moved = to_device(batch, torch.device("cpu"))
    assert moved.sequence_offsets == batch.sequence_offsets
    assert torch.equal(moved.parts[0].labels["ids"], part.labels["ids"])


def test_an_empty_micro_batch_is_one_token_without_loss_rows(units: tuple[Unit, ...]) -> None:
    layout = layout_of(FakeEncoding(), _block(units[0]))
    batch = pack(units, (), [_block(units[0]), _block(units[1])], layouts={KIND: layout})
    assert batch.token_ids.shape == (1, 1)
    assert batch.sequence_offsets == (0, 1)
    assert batch.loss_rows.numel() == batch.target_ids.numel() == 0
    assert batch.parts == ()


def test_a_block_must_hold_exactly_the_rows_of_its_unit(units: tuple[Unit, ...]) -> None:
    unit, block = units[0], _block(units[0])
    check_block(unit, block, header=HEADER, layout=LAYOUT)
    with pytest.raises(UnitRejected, match=r"unit u1.*other tokens"):
        check_block(units[1], block, header=HEADER, layout=LAYOUT)
    short = dataclasses.replace(block, row_offsets=np.array([0, 2, 2]))
    with pytest.raises(UnitRejected, match=r"rows \[0, 2, 2\], asked for \[0, 3, 3\]"):
        check_block(unit, short, header=HEADER, layout=LAYOUT)
    columns = {**block.columns, "ids": block.columns["ids"][1:]}
    with pytest.raises(UnitRejected, match="column ids has 2 rows"):
        check_block(unit, dataclasses.replace(block, columns=columns), header=HEADER, layout=LAYOUT)
    with pytest.raises(UnitRejected, match="others of this run"):
        check_block(unit, block, header=dataclasses.replace(HEADER, dtype="float32"), layout=LAYOUT)
    check_block(
        unit, block, header=dataclasses.replace(HEADER, weights_version="2"), layout=LAYOUT
    )  # a teacher may move


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_name_the_unit_and_the_row(units: tuple[Unit, ...], value: float) -> None:
    block = _block(units[0])
    hidden = torch.from_numpy(block.columns["hidden"].copy()).view(torch.bfloat16)
    hidden[1, 2] = value
    broken = dataclasses.replace(block, columns={**block.columns, "hidden": hidden.view(torch.uint16).numpy()})
    layout = layout_of(FakeEncoding(), block)
    check_finite(units[0], block, layout=layout)
    with pytest.raises(UnitRejected, match=r"unit u0: 1 numbers of column hidden are not finite, first in row 1"):
        check_finite(units[0], broken, layout=layout)


def test_columns_of_another_encoding_are_refused(units: tuple[Unit, ...]) -> None:
    block = dataclasses.replace(_block(units[0]), columns={"ids": np.zeros((3, 2), dtype=np.uint16)})
    with pytest.raises(UnitRejected, match="'ids': \\('uint16', 2\\)"):
        layout_of(FakeEncoding(), block)


def test_parts_are_by_task_and_teacher_and_carry_weights_and_columns(units: tuple[Unit, ...]) -> None:
    """Against a loop over sequences: the tasks' sequences lie together, whatever their order in the micro-batch."""
    random = np.random.default_rng(3)

    def of(task: str, name: str, sample: int, weight: float) -> Sequence:
        mask = np.array([False, True, True, False, True, False])
        column = random.normal(size=6).astype(np.float32)
        made = Sequence(name, np.arange(6, dtype=np.int32) + len(name), mask, "dataset", sample, task, weight=weight)
        return dataclasses.replace(made, columns={"old_logprob": column} if task == "b" else {}, reward=float(sample))

    first, second = of("b", "x", 1, 1.0), of("b", "x", 0, 0.5)
    plain = of("a", "zz", 0, 1.0)
    two = (_unit("a", plain), _unit("b", first, second))
    batch = pack(two, ((1, 0), (0, 0), (1, 1)), [None, None])
    a, b = sorted(batch.parts, key=lambda part: part.task)
    assert batch.token_ids[0].tolist() == [*first.token_ids, *second.token_ids, *plain.token_ids]
    assert (b.rows, a.rows) == (slice(0, 6), slice(6, 9))
    assert batch.target_ids.tolist() == [int(s.token_ids[i + 1]) for s in (first, second, plain) for i in (1, 2, 4)]
    assert b.row_weights.tolist() == [1.0] * 3 + [0.5] * 3
    assert b.columns["old_logprob"].tolist() == [
        float(s.columns["old_logprob"][i]) for s in (first, second) for i in (1, 2, 4)
    ]
    assert (b.groups, b.rewards) == (((1, 0),), (1.0, 0.0))  # in the order of the samples
    assert (a.row_weights, a.columns, a.labels) == (None, {}, {})
    with pytest.raises(ValueError, match="column old_logprob: the sequences x"):
        pack((_unit("b", first, dataclasses.replace(second, columns={})),), ((0, 0), (0, 1)), [None])
