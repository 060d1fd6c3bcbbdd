"""The sequences that were just trained on, as a report shows them: which of a step, and what each rank tells.

A part of every evaluation, and of no other time: one forward pass of one micro-batch at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from trainer.checks.label_rows import PartLabels, shown_rows
from trainer.checks.shown import LabelRows, TrainedTokens
from trainer.loop.packing import pack, to_device
from trainer.model.collectives import all_gather, all_gather_objects
from trainer.model.head import Head
from trainer.model.load import HeadCall
from trainer.types import BatchPart, Sequence, TokenBatch

MAX_SEQUENCES = 8
"""In a report, whatever the run."""
MAX_ROWS, MAX_TOKENS, TOKENS_BEFORE = 96, 384, 48
"""Of one sequence: loss rows, tokens, and those of them that stand before the first loss row."""

LabelsOf = Callable[[BatchPart], "PartLabels | None"]


@dataclass(frozen=True, slots=True)
class TrainedBatch:
    """Sequences of a step, packed by themselves, in the order of the batch."""

    step: int
    batch: TokenBatch
    sequences: tuple[Sequence, ...]


def choose(sequences: AbstractSequence[Sequence], *, most: int, token_budget: int) -> list[int]:
    """Which sequences of a step are shown: of each task in turn, as many as fit into one micro-batch, at least one."""
    turns: dict[int, list[int]] = {}
    seen: dict[tuple[str, str], int] = {}
    for index, sequence in enumerate(sequences):
        if sequence.num_loss_tokens:
            turn = seen[sequence.kind] = seen.get(sequence.kind, -1) + 1
            turns.setdefault(turn, []).append(index)
    chosen: list[int] = []
    for index in (index for turn in sorted(turns) for index in turns[turn]):
        tokens = sum(sequences[i].num_tokens for i in (*chosen, index))
        if len(chosen) < most and (not chosen or tokens <= token_budget):
            chosen.append(index)
    return sorted(chosen)


def evaluate_trained(
    trained: TrainedBatch | None,
    forward: Callable[[TokenBatch, HeadCall], tuple[torch.Tensor, ...]],
    head_of: Callable[[torch.Tensor, torch.Tensor | None], Head],
    labels_of: LabelsOf,
    *,
    most: int,
    device: torch.device,
) -> tuple[TrainedTokens, ...]:
    """Collective. What each rank's last step was trained on, together at most so many texts; one forward on all ranks,
    none where nobody trained."""
    if not int(all_gather(torch.tensor([trained is not None], dtype=torch.int32, device=device)).sum()):
        return ()
    batch = to_device(pack((), (), ()) if trained is None else trained.batch, device)
    found: list = []

    def looked_at(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        found.extend(shown_rows(hidden, head_of(weight, bias), batch, labels_of))
        return (hidden.new_zeros(()),)

    forward(batch, looked_at)
    mine = [] if trained is None else trained_tokens(replace(trained, batch=batch), found, labels_of)
    ranks = all_gather_objects(mine)
    turns: dict[tuple[int, int, str], list[TrainedTokens]] = {}
    for rank, of_rank in enumerate(ranks):
        texts = dict.fromkeys((one.task, one.id) for one in of_rank)
        for task, name in texts:
            turn = [other for other in texts if other[0] == task].index((task, name))
            turns[turn, rank, task] = [one for one in of_rank if (one.task, one.id) == (task, name)]
    return tuple(one for turn in sorted(turns)[:most] for one in turns[turn])


def trained_tokens(
    trained: TrainedBatch, parts: AbstractSequence[AbstractSequence[tuple[str, LabelRows]]], labels_of: LabelsOf
) -> list[TrainedTokens]:
    """The sequences of a batch with their rows, cut to what a report shows."""
    found, sequences = [], iter(trained.sequences)
    for part, distributions in zip(trained.batch.parts, parts, strict=True):
        start, num_rows = 0, part.rows.stop - part.rows.start
        known = labels_of(part) if distributions else None
        while start < num_rows:
            sequence = next(sequences)
            own = slice(start, start + sequence.num_loss_tokens)
            start = own.stop
            found += [_cut(sequence, trained.step, name, rows, own, known) for name, rows in distributions]
    return found


def _cut(sequence: Sequence, step: int, teacher: str, label: LabelRows, own: slice, known: PartLabels) -> TrainedTokens:
    rows = np.flatnonzero(sequence.loss_mask)
    first = max(0, int(rows[0]) - TOKENS_BEFORE)
    shown = np.flatnonzero(rows + 1 < first + MAX_TOKENS)[:MAX_ROWS]
    columns = {field.name: getattr(label, field.name)[own] for field in fields(label)}
    reading = sequence.readings.get(teacher, sequence.reading)
    groups, beside = np.empty(0, dtype=np.int64), ()
    if reading is not None:
        groups = reading.groups[shown]
        predicted = reading.token_ids[np.flatnonzero(reading.loss_mask) + 1]
        beside = tuple(predicted[reading.teacher_groups == group] if group >= 0 else predicted[:0] for group in groups)
        if reading.chunked:
            columns |= _of_chunks(columns, reading.groups)
    return TrainedTokens(
        id=sequence.id,
        step=step,
        task=sequence.task,
        teacher=teacher,
        labels=getattr(known.encoding, "encoding", known.encoding).kind,
        how=known.how if reading is not None else "",
        token_ids=sequence.token_ids[first : int(rows[shown[-1]]) + 2],
        rows=rows[shown] - first,
        label=LabelRows(**{name: column[shown] for name, column in columns.items()}),
        groups=groups,
        beside=beside,
    )


def _of_chunks(columns: Mapping[str, np.ndarray], groups: np.ndarray) -> dict[str, np.ndarray]:
    """Of rows in chunks only the sums over each chunk are known: both log-probabilities of its text."""
    reached = groups >= 0
    changed = {name: np.full(len(groups), np.nan, dtype=np.float32) for name in ("target", "student_target")}
    for name, values in changed.items():
        sums = np.zeros(int(groups.max(initial=-1)) + 1)
        np.add.at(sums, groups[reached], columns[name][reached].astype(np.float64))
        values[reached] = sums[groups[reached]]
    nothing = np.full(len(groups), np.nan, dtype=np.float32)
    return {
        "ids": np.full_like(columns["ids"], -1),
        "num_kept": np.where(reached, 1, 0),
        "tail": nothing,
        "student_tail": nothing,
        **changed,
    }
