"""What every engine does with a unit before and after its model: checks on the way in, block and report on the way out.

A file of its own so that the engines cannot drift apart: a block is the same bytes whoever made it.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.engines.plan import EnginePlan
from configs.labels import Labels
from trainer.errors import EngineDead, UnitRejected
from trainer.labels.encoding import Column, Encoding, TeacherShape, unpack_rows
from trainer.labels.ragged import flatten_ragged
from trainer.types import GenerationRequest, LabelHeader, RowIds, Sequence, SoftLabelBlock, Unit, UnitReport

BFLOAT16_EXPONENT = 0x7F80
"""Bits that are all set in a bfloat16 infinity or NaN, and in nothing else."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Running totals of one engine since it became ready. Subtract two of them to measure what lies between."""

    num_units: int  # finished; a call of `generate` counts as one
    num_tokens: int  # of finished units: tokens read, and for generators tokens written
    num_rows: int  # label rows returned
    num_steps: int  # forward passes over a batch
    busy_s: float  # wall clock with at least one unit inside
    cpu_s: float  # user + system time of this process; tensor-parallel workers are processes of their own
    max_concurrent_units: int  # most units that were inside at the same time


def check_unit(unit: Unit, *, vocabulary_size: int, max_length: int) -> None:
    """Refuse, with `UnitRejected`, what no replica could score."""
    for sequence in unit.sequences:
        length = sequence.num_tokens
        if not 0 < length <= max_length:
            raise UnitRejected(
                f"unit {unit.id}: sequence {sequence.id} has {length} tokens, this engine reads 1 to {max_length}; "
                "lower data.max_length or set data.on_too_long"
            )
        if len(sequence.loss_mask) != length or sequence.loss_mask[-1]:
            raise UnitRejected(
                f"unit {unit.id}: sequence {sequence.id} has {length} tokens and a loss mask of "
                f"{len(sequence.loss_mask)} rows; give as many, the last False (it predicts nothing)"
            )
        check_ids(sequence.token_ids, f"unit {unit.id}: sequence {sequence.id}", vocabulary_size)
    if not unit.num_rows:
        raise UnitRejected(f"unit {unit.id}: no row of its {len(unit.sequences)} sequence(s) counts in the loss")


def check_given(unit: Unit, given: RowIds | None, *, encoding: Labels, vocabulary_size: int) -> None:
    """Refuse, with `UnitRejected`, ids that a teacher cannot be asked about; a unit that passed `check_unit`."""
    if given is None or not encoding.takes_ids:
        if given is None and not encoding.takes_ids:
            return
        wanted = "needs ids of each row" if encoding.takes_ids else "takes no ids"
        raise UnitRejected(f"unit {unit.id}: labels: {encoding.kind} {wanted}, the request holds {given and 'some'}")
    ids, shape = given.ids, (unit.num_rows, encoding.num_given)
    if given.tokens_hash != unit.tokens_hash():
        raise UnitRejected(f"unit {unit.id}: its ids were given for other tokens ({given.tokens_hash})")
    if ids.shape != shape or ids.dtype.kind != "i":
        raise UnitRejected(
            f"unit {unit.id}: its given ids are {ids.dtype} {list(ids.shape)}, needed are int {list(shape)}"
        )
    _check_given_rows(unit, ids, vocabulary_size)


def _check_given_rows(unit: Unit, ids: np.ndarray, vocabulary_size: int) -> None:
    """Ids of the vocabulary, each once in its row, and behind the last one -1: a repeated id would count twice."""
    absent = ids == -1
    ordered = np.sort(ids, axis=1)
    wrong = {
        f"an id outside the vocabulary of {vocabulary_size}": (ids < -1) | (ids >= vocabulary_size),
        "no id at all, or one behind a -1": absent[:, :1] | (absent[:, :-1] & ~absent[:, 1:]).any(1, keepdims=True),
        "an id twice": (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1),
    }
    for what, places in wrong.items():
        if places.any():
            row = int(np.flatnonzero(places.any(1))[0])
            raise UnitRejected(f"unit {unit.id}: row {row} of its given ids holds {what}: {ids[row, :8].tolist()} ...")


def check_request(request: GenerationRequest, *, vocabulary_size: int, max_length: int) -> None:
    """Refuse, with `UnitRejected`, a prompt that leaves no room for an answer or holds a wrong id."""
    what = f"prompt {request.prompt_id}" + (f" ({request.origin})" if request.origin else "")
    if not 0 < len(request.token_ids) < max_length:
        raise UnitRejected(
            f"{what} has {len(request.token_ids)} tokens; this engine reads and writes {max_length} together, so a "
            f"prompt has 1 to {max_length - 1}"
        )
    check_ids(request.token_ids, what, vocabulary_size)


def check_ids(token_ids: np.ndarray, what: str, vocabulary_size: int) -> None:
    """Ids beyond the true vocabulary have an embedding row in padded models, so the model itself would not refuse."""
    wrong = np.flatnonzero((token_ids < 0) | (token_ids >= vocabulary_size))
    if len(wrong):
        at = int(wrong[0])
        raise UnitRejected(
            f"{what}: token id {int(token_ids[at])} at {at} is outside the vocabulary of {vocabulary_size}"
        )


def with_given(unit: Unit, given: RowIds | None) -> list[tuple[Sequence, np.ndarray | None]]:
    """The sequences that have loss rows, each with the ids given for these, int32 [n, K]."""
    asked = [sequence for sequence in unit.sequences if sequence.num_loss_tokens]
    return list(zip(asked, [None] * len(asked) if given is None else given.of_sequences(unit), strict=True))


def label_block(
    unit: Unit,
    packed: AbstractSequence[np.ndarray],
    *,
    plan: EnginePlan,
    spec: Labels,
    layout: tuple[Column, ...],
    hidden_size: int,
) -> SoftLabelBlock:
    """A block from the packed rows (uint8 [n, bytes]) of each sequence that has loss rows, in order.

    Raises `EngineDead` if an engine returned other rows than it was asked for: nothing it says can be trusted then.
    """
    rows = [sequence.num_loss_tokens for sequence in unit.sequences]
    asked = [n for n in rows if n]
    returned = [len(part) for part in packed]
    if asked != returned:
        raise EngineDead(f"unit {unit.id}: asked for {asked} rows, the engine returned {returned}")
    columns = flatten_ragged(unpack_rows(np.concatenate(packed), layout), layout)
    header = label_header(plan, spec, hidden_size=hidden_size)
    offsets = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
    return SoftLabelBlock(header=header, tokens_hash=unit.tokens_hash(), columns=columns, row_offsets=offsets)


def label_header(plan: EnginePlan, spec: Labels, *, hidden_size: int) -> LabelHeader:
    """What the numbers mean that a scorer of this plan makes."""
    return LabelHeader(
        teacher=plan.teacher,
        weights_version=plan.weights_version,
        encoding=spec,
        tokenizer_fingerprint=plan.tokenizer_fingerprint,
        vocabulary_size=plan.vocabulary_size,
        hidden_size=hidden_size,
        dtype=plan.dtype,
    )


def unit_report(
    unit: Unit,
    block: SoftLabelBlock,
    *,
    replica: str,
    encoding: Encoding,
    layout: tuple[Column, ...],
    score_s: float,
    started_s: float,
) -> UnitReport:
    return UnitReport(
        unit_id=unit.id,
        tokens_hash=block.tokens_hash,
        replica=replica,
        num_rows=block.num_rows,
        num_tokens=unit.num_tokens,
        num_bytes=block.num_bytes,
        num_non_finite=sum(count_non_finite(block.columns[c.name], c.dtype) for c in layout),
        mean_mass=float(encoding.mass(block.columns)),
        mean_entropy=encoding.entropy(block.columns),
        score_s=score_s,
        started_s=started_s,
    )


def count_non_finite(column: np.ndarray, dtype: torch.dtype) -> int:
    """NaN and infinite entries of a column; a column of ids has none."""
    if dtype is torch.bfloat16:
        return int(np.count_nonzero((column & BFLOAT16_EXPONENT) == BFLOAT16_EXPONENT))
    if not dtype.is_floating_point:
        return 0
    return int(column.size - np.count_nonzero(np.isfinite(column)))


def teacher_shape(plan: EnginePlan, hidden_size: int) -> TeacherShape:
    return TeacherShape(vocabulary_size=plan.vocabulary_size, hidden_size=hidden_size, dtype=getattr(torch, plan.dtype))
