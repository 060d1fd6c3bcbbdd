"""From a rank's units and label blocks to packed micro-batches: check, concatenate, copy to the device.

    units [sequences] + blocks [rows]  --check_block, pack-->  TokenBatch in host memory  --to_device-->

`pack` copies out of the blocks (which may be read-only views of an object store), in the background of a running step;
`to_device` is all that the step itself waits for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from types import MappingProxyType

import numpy as np
import torch

from trainer.align.blocks import chunk_numbers
from trainer.errors import UnitRejected
from trainer.labels.encoding import Column, Encoding, TeacherShape
from trainer.labels.ragged import has_form, num_entries, padded, rows_of
from trainer.types import BatchPart, LabelHeader, Sequence, SoftLabelBlock, TokenBatch, Unit


def check_block(unit: Unit, block: SoftLabelBlock, *, header: LabelHeader, layout: AbstractSequence[Column]) -> None:
    """Raises `UnitRejected` naming the unit unless the block holds labels of exactly its tokens and rows, as meant by
    `header`; its teacher may have moved on to other weights."""
    if dataclasses.replace(block.header, weights_version=header.weights_version) != header:
        raise UnitRejected(f"unit {unit.id}: its labels are {block.header}, the others of this run are {header}")
    if block.tokens_hash != unit.tokens_hash():
        raise UnitRejected(f"unit {unit.id}: its labels were made for other tokens ({block.tokens_hash})")
    wanted = np.cumsum([0, *(sequence.num_loss_tokens for sequence in unit.sequences)])
    if not np.array_equal(block.row_offsets, wanted):
        raise UnitRejected(f"unit {unit.id}: labels for rows {block.row_offsets.tolist()}, asked for {wanted.tolist()}")
    # Those that count the entries of others first: they are fixed, and have the right length when they are added up.
    for column in sorted(layout, key=lambda one: one.counts != ""):
        found, asked = len(block.columns[column.name]), num_entries(block.columns, column, int(wanted[-1]))
        if found != asked:
            what = "entries" if column.counts else "rows"
            raise UnitRejected(f"unit {unit.id}: column {column.name} has {found} {what}, asked for {asked}")
        if column.counts and block.columns[column.counts].max(initial=0) > column.width:
            raise UnitRejected(f"unit {unit.id}: {column.counts} counts more than {column.width} entries of a row")


def check_finite(unit: Unit, block: SoftLabelBlock, *, layout: AbstractSequence[Column]) -> None:
    """Raises `UnitRejected` where a label is NaN or infinite: encodings write mass zero as a finite number."""
    for column in layout:
        if not column.dtype.is_floating_point:
            continue
        values = _to_torch(np.ascontiguousarray(block.columns[column.name]), column.dtype)
        bad = ~values.isfinite()
        if bad.any():
            first = f"{'entry' if column.counts else 'row'} {int(bad.nonzero()[0, 0])}"
            raise UnitRejected(
                f"unit {unit.id}: {int(bad.sum())} numbers of column {column.name} are not finite, first in {first}"
            )


def layout_of(encoding: Encoding, block: SoftLabelBlock) -> tuple[Column, ...]:
    """The encoding's layout as the header says it. Raises `UnitRejected` where the columns are others."""
    header = block.header
    shape = TeacherShape(
        vocabulary_size=header.vocabulary_size,
        hidden_size=header.hidden_size,
        dtype=getattr(torch, header.dtype),
    )
    layout = encoding.layout(shape)
    if not all(has_form(column, block.columns.get(column.name)) for column in layout):
        described = {name: (column.dtype.name, *column.shape[1:]) for name, column in block.columns.items()}
        raise UnitRejected(f"the labels of {header.teacher} have columns {described}, not those of {encoding}")
    return layout


Layouts = Mapping[tuple[str, str], AbstractSequence[Column]]
"""By task and teacher (`Unit.kind`); one that is not named has no labels."""


def pack(
    units: AbstractSequence[Unit],
    micro_batch: AbstractSequence[tuple[int, int]],
    blocks: AbstractSequence[SoftLabelBlock | None],
    *,
    layouts: Layouts = MappingProxyType({}),
    pin: bool = False,
) -> TokenBatch:
    """One micro-batch in host memory: the sequences `(unit, sequence inside it)` one after another, those of one task
    and teacher together.

    Labels and columns follow the loss rows. An empty micro-batch becomes one token without a loss row, so that every
    rank runs the same number of forward and backward passes over tensors that kernels accept. `pin` for memory that a
    device copies. `blocks[u]` is only read where the unit's task and teacher have a layout.
    """
    places = parts_of(units, micro_batch)
    sequences = [units[u].sequences[s] for part in places for u, s in part]
    lengths = [sequence.num_tokens for sequence in sequences] or [1]
    offsets = np.cumsum([0, *lengths])
    tokens = np.concatenate([s.token_ids for s in sequences] or [np.zeros(1)]).astype(np.int64)
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    rows = np.flatnonzero(np.concatenate([s.loss_mask for s in sequences] or [np.zeros(1, dtype=bool)]))
    parts, start = [], 0
    for part in places:
        layout = layouts.get(units[part[0][0]].kind, ())
        parts.append(_part(units, part, blocks, start=start, layout=layout))
        start = parts[-1].rows.stop
    batch = TokenBatch(
        token_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        sequence_offsets=tuple(offsets.tolist()),
        loss_rows=torch.from_numpy(rows),
        target_ids=torch.from_numpy(tokens[rows + 1]),
        parts=tuple(parts),
    )
    return _each_tensor(batch, torch.Tensor.pin_memory) if pin else batch


def parts_of(
    units: AbstractSequence[Unit], micro_batch: AbstractSequence[tuple[int, int]]
) -> list[list[tuple[int, int]]]:
    """The sequences of each part of a packed micro-batch, part by part in the order of its rows."""
    kinds = dict.fromkeys(units[u].kind for u, _ in micro_batch)
    return [[place for place in micro_batch if units[place[0]].kind == kind] for kind in kinds]


def _part(
    units: AbstractSequence[Unit],
    places: AbstractSequence[tuple[int, int]],
    blocks: AbstractSequence[SoftLabelBlock | None],
    *,
    start: int,
    layout: AbstractSequence[Column],
) -> BatchPart:
    """The part of these sequences, whose first loss row is row `start` of the micro-batch."""
    sequences = [units[u].sequences[s] for u, s in places]
    counts = [sequence.num_loss_tokens for sequence in sequences]
    weights = np.concatenate([_row_weights(sequence) for sequence in sequences])
    names = sorted({name for sequence in sequences for name in sequence.columns})
    members: dict[tuple[str, str], list[int]] = {}
    for index, sequence in enumerate(sequences):
        members.setdefault(sequence.group, []).append(index)
    task, teacher = units[places[0][0]].kind
    of_rows = np.repeat(np.arange(len(sequences)), counts)
    rewards = tuple(sequence.reward for sequence in sequences)
    groups = tuple(tuple(sorted(group, key=lambda i: sequences[i].sample)) for group in members.values())
    readings = [sequence.reading for sequence in sequences if sequence.reading is not None]
    if readings and readings[0].chunked:  # what is summed are chunks, and in the place of the last what is in none
        of_rows, num_chunks = chunk_numbers(readings)
        rewards, groups = (None,) * (num_chunks + 1), tuple((chunk,) for chunk in range(num_chunks))
    return BatchPart(
        task=task,
        teacher=teacher,
        rows=slice(start, start + sum(counts)),
        labels=_labels(layout, [(blocks[u], s) for u, s in places]),
        columns={name: torch.from_numpy(_column(sequences, name)) for name in names},
        row_weights=None if (weights == 1).all() else torch.from_numpy(weights),
        row_sequences=torch.from_numpy(of_rows),
        groups=groups,
        rewards=rewards,
        prompts=tuple(sequence.group[1] for sequence in sequences),
    )


def _row_weights(sequence: Sequence) -> np.ndarray:
    """float32 [n]: of its loss rows in the row terms."""
    if sequence.row_weights is None:
        return np.full(sequence.num_loss_tokens, sequence.weight, dtype=np.float32)
    return (sequence.weight * sequence.row_weights[sequence.loss_mask]).astype(np.float32)


def _column(sequences: AbstractSequence[Sequence], name: str) -> np.ndarray:
    """float32 [n]: a column at the loss rows. Raises `ValueError` where only some sequences of a task have it."""
    if missing := [sequence.id for sequence in sequences if name not in sequence.columns]:
        raise ValueError(f"column {name}: the sequences {', '.join(missing[:3])} of its task have none")
    return np.concatenate([s.columns[name][s.loss_mask] for s in sequences]).astype(np.float32)


def to_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The batch on the device; copies run behind the caller's back where its memory is pinned."""
    return _each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _labels(
    layout: AbstractSequence[Column], places: AbstractSequence[tuple[SoftLabelBlock, int]]
) -> dict[str, torch.Tensor]:
    """Each column of these sequences of blocks, [n, width]; of a ragged one the width is that of its longest row."""
    joined = {
        column.name: np.concatenate(
            [rows_of(block.columns, column, *block.row_offsets[s : s + 2].tolist()) for block, s in places]
        )
        for column in layout
    }
    return {
        column.name: _to_torch(
            padded(joined[column.name], joined[column.counts]) if column.counts else joined[column.name], column.dtype
        )
        for column in layout
    }


def _to_torch(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    if not values.flags.writeable:
        values = values.copy()
    tensor = torch.from_numpy(values)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def _each_tensor(batch: TokenBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> TokenBatch:
    parts = [
        dataclasses.replace(
            part,
            labels={name: change(column) for name, column in part.labels.items()},
            columns={name: change(column) for name, column in part.columns.items()},
            row_weights=None if part.row_weights is None else change(part.row_weights),
            row_sequences=change(part.row_sequences),
        )
        for part in batch.parts
    ]
    return dataclasses.replace(
        batch,
        token_ids=change(batch.token_ids),
        position_ids=change(batch.position_ids),
        loss_rows=change(batch.loss_rows),
        target_ids=change(batch.target_ids),
        parts=tuple(parts),
    )
