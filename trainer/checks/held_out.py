"""Evaluation of a rank: its held-out batches through the student's forward, and all ranks' rows added up.

The row mathematics is `trainer/checks/evaluate.py`; this file is about batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, fields, replace

import torch

from trainer.align.aligner import SharedIds
from trainer.checks.evaluate import (
    EvaluationRows,
    EvaluationSums,
    StudentHead,
    TeacherStates,
    TeachersTogether,
    evaluation_rows,
)
from trainer.checks.shown import Worst
from trainer.checks.worst import combined, name_of, texts_of, worst_of
from trainer.labels.encoding import ALIGNED
from trainer.loop.packing import pack, to_device
from trainer.loop.staging import HeldOutBatch
from trainer.loop.together import names_of
from trainer.losses.ensemble import WEIGHT, Mix
from trainer.model.collectives import all_gather, all_gather_objects
from trainer.model.head import Head, HeadShape
from trainer.model.load import HeadCall
from trainer.types import BatchPart, Evaluation, SampleTokens, TokenBatch

NO_BATCH = HeldOutBatch(batch=pack((), (), ()), members=())


@dataclass(frozen=True, slots=True)
class Measure:
    """How the rows of a batch are measured on this rank."""

    forward: Callable[[TokenBatch, HeadCall], tuple[torch.Tensor, ...]]  # of the sharded student
    head_shape: HeadShape
    teacher_head: Callable[[str], Head | None]  # by the teacher's name
    mixes: Mapping[str, Mix]  # by set of held-out rows: how teachers that were asked together become one
    shared_ids: Callable[[str], SharedIds | None]  # with a teacher's vocabulary, where it is another
    common_ids: Callable[[str], Mapping[str, SharedIds]]  # with those of several by name, where they are others
    vocabulary_size: int
    chunk_rows: int
    device: torch.device

    def rows(self, host_batch: TokenBatch) -> EvaluationRows:
        """Collective. Of a batch of one task and teacher, or of none."""
        batch = to_device(host_batch, self.device)

        def measured(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            if not batch.parts:
                return _columns(EvaluationRows.empty(hidden, 0, num_scored=0))
            (part,) = batch.parts
            head = StudentHead.of(weight, bias, self.head_shape, self.vocabulary_size)
            teacher = self._teacher(part)
            return _columns(evaluation_rows(hidden, head, batch.target_ids, teacher, chunk_rows=self.chunk_rows))

        return EvaluationRows(*self.forward(batch, measured))

    def _teacher(self, part: BatchPart) -> TeacherStates | TeachersTogether | None:
        """What was said of the rows of a part; None where nobody scored them."""
        if not part.labels:
            return None
        if (mix := self.mixes.get(part.task)) is None:
            aligned = part.labels.get(ALIGNED)
            shared = None if aligned is None else self.shared_ids(part.teacher)
            rows = None if aligned is None else aligned[:, 0] > 0
            return TeacherStates(part.labels["hidden"], self.teacher_head(part.teacher), shared, rows)
        names = names_of(part.teacher)
        common, aligned = self.common_ids(part.teacher) if ALIGNED in part.labels else {}, None
        if common:
            aligned = torch.cat([part.labels[f"{name}/{ALIGNED}"] for name in names], 1).amin(1) > 0
        states = tuple(
            TeacherStates(part.labels[f"{name}/hidden"], self.teacher_head(name), common.get(name)) for name in names
        )
        return TeachersTogether(states, tuple(part.labels[f"{name}/{WEIGHT}"] for name in names), mix, aligned)


def evaluate_held_out(
    held_out: AbstractSequence[HeldOutBatch], measure: Measure, *, step: int, viewer_sequences: int
) -> Evaluation:
    """Collective. Equal numbers on all ranks; of each rank's first sequences samples, together `viewer_sequences`.

    A rank may hold none. All ranks run the same number of forwards.
    """
    most = int(all_gather(torch.tensor([len(held_out)], device=measure.device)).amax())
    sums: dict[str, list[EvaluationSums]] = {}
    samples: dict[int, SampleTokens] = {}
    worst = Worst()
    for item in (*held_out, *[NO_BATCH] * (most - len(held_out))):
        rows = measure.rows(item.batch)
        for part in item.batch.parts:
            sums.setdefault(part.task, []).append(
                EvaluationSums.of(rows, names_of(part.teacher), aligned=ALIGNED in part.labels)
            )
        samples |= _samples(item, rows, first=viewer_sequences)
        if viewer_sequences:
            worst = combined([worst, worst_of(item, rows)])
    mine = {name: EvaluationSums.combine(parts) for name, parts in sums.items()}
    ranks = all_gather_objects((mine, [samples[position] for position in sorted(samples)], worst))
    shown = [sample for _, of_rank, _ in ranks for sample in of_rank]
    total = _in_sum([of_rank for of_rank, _, _ in ranks], step)
    furthest = combined(of_rank for _, _, of_rank in ranks)
    return replace(total, samples=tuple(shown[:viewer_sequences]), worst=furthest)


def _in_sum(ranks: AbstractSequence[Mapping[str, EvaluationSums]], step: int) -> Evaluation:
    """Of all held-out rows, and where they are of several tasks, of each."""
    names = sorted({name for rank in ranks for name in rank})
    tasks = {name: EvaluationSums.combine(rank[name] for rank in ranks if name in rank) for name in names}
    total = EvaluationSums.combine(tasks.values()).result(step)
    if len(tasks) == 1:
        return total
    return replace(total, tasks={name: one.result(step) for name, one in tasks.items()}, teachers={})


def _columns(rows: EvaluationRows) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(rows, field.name) for field in fields(rows))


def without_samples(evaluation: Evaluation) -> Evaluation:
    """The numbers alone, for ranks whose answer nobody shows."""
    return replace(evaluation, samples=(), trained=(), worst=None)


def _samples(item: HeldOutBatch, rows: EvaluationRows, *, first: int) -> dict[int, SampleTokens]:
    """By position, those of the rank's `first` sequences that are in this batch and that a teacher scored."""
    if not len(rows.kl) or all(position >= first for position, _, _ in item.members):
        return {}
    student, teacher, kl = (x.cpu().numpy() for x in (rows.student_logprob, rows.teacher_logprob, rows.kl))
    return {
        text.position: SampleTokens(
            id=name_of(text.sequence),
            token_ids=text.sequence.token_ids,
            rows=text.shown,
            student_logprob=student[text.student],
            teacher_logprob=teacher[text.scored].copy(),
            kl=kl[text.scored].copy(),
        )
        for text in texts_of(item)
        if text.position < first
    }
