"""What a step's text of the student is weighed by, of all ranks together: before the first backward pass of the step.

each part:  labels, rollout_logprobs, rewards  ->  numbers of each answer  --all ranks-->  columns of each part
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence

import torch

from trainer.loop.packing import to_device
from trainer.losses.ensemble import target_logprobs
from trainer.losses.fused import LossPart
from trainer.losses.objective import Objective
from trainer.losses.returns import REWARDS, AnswerNumbers, Returns, Scope, scopes_of, token_rewards
from trainer.model.collectives import all_gather_objects
from trainer.types import WRITTEN, BatchPart, TokenBatch

Columns = Mapping[str, torch.Tensor]
PartOf = Callable[[BatchPart], LossPart]
_Numbers = Mapping[str, AbstractSequence[AnswerNumbers | None]]
"""Of each answer of a part, by term."""


def columns_of_step(
    batches: AbstractSequence[TokenBatch],
    objectives: Mapping[str, Objective],
    part_of: PartOf,
    *,
    device: torch.device,
    vocabulary_size: int,
    chunk_rows: int,
) -> list[list[Columns]]:
    """Collective where an objective has a baseline. Of each micro-batch and part of this rank's the columns of its
    `LossPart`, all in host memory; one micro-batch is on the device at a time, and only for a baseline."""
    returns = {(task, one.name): one for task, objective in objectives.items() for one in objective.returns}
    compared = {key: one for key, one in returns.items() if one.baseline != "none"}
    found: list[list[_Numbers]] = []
    for batch in batches:
        asked = [[one for (task, _), one in compared.items() if task == part.task] for part in batch.parts]
        moved = to_device(batch, device) if any(asked) else batch
        found.append([])
        for part, own in zip(moved.parts, asked, strict=True):
            limits = {"vocabulary_size": vocabulary_size, "chunk_rows": chunk_rows}
            teacher = _teacher(part_of(part), moved, own, **limits) if own else None
            found[-1].append({one.name: _numbers(one, part, teacher) for one in own})
    scopes = _scopes_of_step(batches, found) if compared else {}
    return [
        [
            _columns(part, objectives[part.task].returns, own, scopes)
            for part, own in zip(batch.parts, of_parts, strict=True)
        ]
        for batch, of_parts in zip(batches, found, strict=True)
    ]


def _scopes_of_step(
    batches: AbstractSequence[TokenBatch], found: AbstractSequence[AbstractSequence[_Numbers]]
) -> dict[tuple[str, str], dict[str, Scope]]:
    """Collective. What answers of all ranks are compared with, by task and term."""
    mine = [
        (part.task, name, one)
        for batch, of_parts in zip(batches, found, strict=True)
        for part, own in zip(batch.parts, of_parts, strict=True)
        for name, answers in own.items()
        for one in answers
        if one is not None
    ]
    answers: dict[tuple[str, str], list[AnswerNumbers]] = {}
    for task, name, one in (one for of_rank in all_gather_objects(mine) for one in of_rank):
        answers.setdefault((task, name), []).append(one)
    return {key: scopes_of(members) for key, members in answers.items()}


def _columns(
    part: BatchPart,
    returns: AbstractSequence[Returns],
    found: _Numbers,
    scopes: Mapping[tuple[str, str], Mapping[str, Scope]],
) -> Columns:
    """Of a part in host memory."""
    columns = dict(part.columns)
    rewards = token_rewards(part.rewards, part.columns.get(REWARDS), part.row_sequences)
    for one in returns:
        answers = found.get(one.name, [None] * len(part.rewards))
        columns |= one.columns(answers, scopes.get((part.task, one.name), {}), rewards, part.row_sequences)
    return columns


def _numbers(returns: Returns, part: BatchPart, teacher: torch.Tensor | None) -> list[AnswerNumbers | None]:
    rewards = token_rewards(part.rewards, part.columns.get(REWARDS), part.row_sequences)
    return returns.numbers(part.columns[WRITTEN], teacher, rewards, part.row_sequences, part.prompts)


def _teacher(
    part: LossPart, batch: TokenBatch, returns: AbstractSequence[Returns], *, vocabulary_size: int, chunk_rows: int
) -> torch.Tensor | None:
    """Its log-probabilities of the part's target ids; None where nothing sampled needs them."""
    if not any(one.samples for one in returns):
        return None
    target_ids = batch.target_ids[part.rows]
    return target_logprobs(
        part.encoding,
        part.labels,
        target_ids,
        part.teacher_head,
        vocabulary_size=vocabulary_size,
        chunk_rows=chunk_rows,
    )
