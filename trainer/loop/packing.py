"""From a rank's units and label blocks to packed micro-batches: check, concatenate, carry to the device.

    units [sequences] + blocks [rows]  --check_block, pack-->  TokenBatch in host memory  --carry-->  on the device

`pack` copies out of the blocks (which may be read-only views of an object store), in the background of a running step;
`carry` is all that the step itself waits for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence

import numpy as np
import torch

from trainer.errors import UnitRejected
from trainer.labels.encoding import Column, Encoding, TeacherShape, numpy_dtype
from trainer.types import LabelHeader, SoftLabelBlock, TokenBatch, Unit


def check_block(unit: Unit, block: SoftLabelBlock, *, header: LabelHeader) -> None:
    """Raises `UnitRejected` naming the unit unless the block holds labels of exactly its tokens and rows, as meant by
    `header`."""
    if block.header != header:
        raise UnitRejected(f"unit {unit.id}: its labels are {block.header}, the others of this run are {header}")
    if block.tokens_hash != unit.tokens_hash():
        raise UnitRejected(f"unit {unit.id}: its labels were made for other tokens ({block.tokens_hash})")
    wanted = np.cumsum([0, *(sequence.num_loss_tokens for sequence in unit.sequences)])
    if not np.array_equal(block.row_offsets, wanted):
        raise UnitRejected(f"unit {unit.id}: labels for rows {block.row_offsets.tolist()}, asked for {wanted.tolist()}")
    for name, column in block.columns.items():
        if len(column) != wanted[-1]:
            raise UnitRejected(f"unit {unit.id}: column {name} has {len(column)} rows, asked for {wanted[-1]}")


def check_finite(unit: Unit, block: SoftLabelBlock, *, layout: AbstractSequence[Column]) -> None:
    """Raises `UnitRejected` where a label is NaN or infinite: encodings write mass zero as a finite number."""
    for column in layout:
        if not column.dtype.is_floating_point:
            continue
        values = _to_torch(np.ascontiguousarray(block.columns[column.name]), column.dtype)
        bad = ~values.isfinite()
        if bad.any():
            row = int(bad.any(dim=1).nonzero()[0])
            raise UnitRejected(
                f"unit {unit.id}: {int(bad.sum())} numbers of column {column.name} are not finite, first in row {row}"
            )


def layout_of(encoding: Encoding, block: SoftLabelBlock) -> tuple[Column, ...]:
    """The encoding's layout as this block has it.

    Numpy has no bfloat16 and a block does not name the teacher's dtype, so the dtype whose layout fits the columns is
    taken; `UnitRejected` if none does.
    """
    widths = {name: column.shape[1] for name, column in block.columns.items()}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for hidden_size in sorted(set(widths.values())) or [1]:
            shape = TeacherShape(vocabulary_size=block.header.vocabulary_size, hidden_size=hidden_size, dtype=dtype)
            layout = encoding.layout(shape)
            if all(_fits(column, block.columns.get(column.name)) for column in layout):
                return layout
    described = {name: (column.dtype.name, column.shape[1]) for name, column in block.columns.items()}
    raise UnitRejected(f"the labels of {block.header.teacher} have columns {described}, not those of {encoding}")


def _fits(column: Column, values: np.ndarray | None) -> bool:
    return values is not None and values.shape[1] == column.width and values.dtype == numpy_dtype(column.dtype)


def pack(
    units: AbstractSequence[Unit],
    micro_batch: AbstractSequence[tuple[int, int]],
    blocks: AbstractSequence[SoftLabelBlock],
    *,
    layout: AbstractSequence[Column] = (),
    pin: bool = False,
) -> TokenBatch:
    """One micro-batch in host memory: the sequences `(unit, sequence inside it)` one after another.

    Labels follow the loss rows. An empty micro-batch becomes one token without a loss row, so that every rank runs the
    same number of forward and backward passes over tensors that kernels accept. `pin` for memory that a device copies.
    """
    sequences = [units[u].sequences[s] for u, s in micro_batch]
    lengths = [sequence.num_tokens for sequence in sequences] or [1]
    offsets = np.cumsum([0, *lengths])
    tokens = np.concatenate([s.token_ids for s in sequences] or [np.zeros(1)]).astype(np.int64)
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    rows = np.flatnonzero(np.concatenate([s.loss_mask for s in sequences] or [np.zeros(1, dtype=bool)]))
    labels = {}
    for column in layout:
        parts = [_rows_of(blocks[u], s, column.name) for u, s in micro_batch]
        if parts:
            labels[column.name] = _to_torch(np.concatenate(parts), column.dtype)
        else:
            labels[column.name] = torch.empty(0, column.width, dtype=column.dtype)
    batch = TokenBatch(
        token_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        sequence_offsets=tuple(offsets.tolist()),
        loss_rows=torch.from_numpy(rows),
        next_ids=torch.from_numpy(tokens[rows + 1]),
        labels=labels,
    )
    return _each_tensor(batch, torch.Tensor.pin_memory) if pin else batch


def carry(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The batch on the device; copies run behind the caller's back where its memory is pinned."""
    return _each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _rows_of(block: SoftLabelBlock, sequence: int, column: str) -> np.ndarray:
    start, stop = block.row_offsets[sequence : sequence + 2]
    return block.columns[column][start:stop]


def _to_torch(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    if not values.flags.writeable:
        values = values.copy()
    tensor = torch.from_numpy(values)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def _each_tensor(batch: TokenBatch, change) -> TokenBatch:
    labels: Mapping[str, torch.Tensor] = {name: change(column) for name, column in batch.labels.items()}
    return dataclasses.replace(
        batch,
        token_ids=change(batch.token_ids),
        position_ids=change(batch.position_ids),
        loss_rows=change(batch.loss_rows),
        next_ids=change(batch.next_ids),
        labels=labels,
    )
