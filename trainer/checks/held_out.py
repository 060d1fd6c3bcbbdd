"""Evaluation of a rank: its held-out batches through the student's forward, and all ranks' rows added up.

The row mathematics is `trainer/checks/evaluate.py`; this file is about batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace

import numpy as np
import torch

from trainer.checks.evaluate import EvaluationRows, EvaluationSums, evaluation_rows
from trainer.loop.packing import pack, to_device
from trainer.loop.staging import HeldOutBatch
from trainer.model.collectives import gather_numbers, gather_objects
from trainer.model.head import Head, HeadShape
from trainer.model.load import HeadCall
from trainer.types import Evaluation, SampleTokens, TokenBatch


@torch.no_grad()
def evaluate_held_out(
    held_out: AbstractSequence[HeldOutBatch],
    forward: Callable[[TokenBatch, HeadCall], tuple[torch.Tensor, ...]],
    *,
    step: int,
    viewer_sequences: int,
    head_shape: HeadShape,
    teacher_head: Callable[[str], Head | None],
    vocabulary_size: int,
    chunk_rows: int,
    device: torch.device,
) -> Evaluation:
    """Collective. Equal numbers on all ranks; of each rank's first sequences samples, together `viewer_sequences`.

    A rank may hold none. `teacher_head` finds the head of the teacher that a batch names. All ranks run the same number
    of forwards.
    """
    most = int(gather_numbers(torch.tensor([len(held_out)], device=device)).amax())
    nothing = HeldOutBatch(batch=pack((), (), ()), members=())
    sums, samples = [], {}
    for item in (*held_out, *[nothing] * (most - len(held_out))):
        batch = to_device(item.batch, device)

        def compare(hidden, weight, bias, batch=batch) -> tuple[torch.Tensor, ...]:
            if not len(batch.loss_rows):
                empty = hidden.new_empty(0, dtype=torch.float32)
                return empty, empty.bool(), empty, empty, empty
            (part,) = batch.parts
            rows = evaluation_rows(
                hidden,
                weight,
                bias,
                head_shape=head_shape,
                vocabulary_size=vocabulary_size,
                teacher_hidden=part.labels["hidden"],
                teacher_head=teacher_head(part.teacher),
                next_ids=batch.target_ids,
                chunk_rows=chunk_rows,
            )
            return rows.kl, rows.agree, rows.student_logprob, rows.teacher_logprob, rows.padding_mass

        rows = EvaluationRows(*forward(batch, compare))
        sums.append(EvaluationSums.of(rows))
        samples |= _samples(item, rows, first=viewer_sequences)
    mine = EvaluationSums.combine(sums).to_tensor(device)
    total = EvaluationSums.combine(EvaluationSums.from_tensor(row) for row in gather_numbers(mine))
    ranks = gather_objects([samples[position] for position in sorted(samples)])
    shown = [sample for rank in ranks for sample in rank]
    return total.result(step, tuple(shown[:viewer_sequences]))


def without_samples(evaluation: Evaluation) -> Evaluation:
    """The numbers alone, for ranks whose answer nobody shows."""
    return replace(evaluation, samples=())


def _samples(item: HeldOutBatch, rows: EvaluationRows, *, first: int) -> dict[int, SampleTokens]:
    """By position, those of the rank's `first` sequences that are in this batch."""
    if all(position >= first for position, _, _ in item.members):
        return {}
    student, teacher, kl = (x.cpu().numpy() for x in (rows.student_logprob, rows.teacher_logprob, rows.kl))
    samples, start = {}, 0
    for position, unit, inside in item.members:
        sequence = unit.sequences[inside]
        part = slice(start, start + sequence.num_loss_tokens)
        start = part.stop
        if position < first:
            samples[position] = SampleTokens(
                id=sequence.id,
                token_ids=sequence.token_ids,
                rows=np.flatnonzero(sequence.loss_mask),
                student_logprob=student[part].copy(),
                teacher_logprob=teacher[part].copy(),
                kl=kl[part].copy(),
            )
    return samples
