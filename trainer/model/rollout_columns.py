"""What a step's text of the student is weighed by, of all ranks together: before the first backward pass of the step.

each part:  labels, rollout_logprobs, rewards  ->  numbers of each answer  --all ranks-->  columns of each part
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence

import torch

from trainer.losses.ensemble import target_logprobs
from trainer.losses.fused import LossPart
from trainer.losses.objective import Objective
from trainer.losses.returns import REWARDS, WRITTEN, AnswerNumbers, Returns, scopes_of, token_rewards
from trainer.model.collectives import all_gather_objects
from trainer.types import BatchPart, TokenBatch

Columns = Mapping[str, torch.Tensor]
PartOf = Callable[[BatchPart], LossPart]


def columns_of_step(
    batches: AbstractSequence[TokenBatch],
    objectives: Mapping[str, Objective],
    part_of: PartOf,
    *,
    vocabulary_size: int,
    chunk_rows: int,
) -> list[list[Columns]]:
    """Collective where an objective has a baseline. Of each micro-batch and part of this rank's the columns of its
    `LossPart`; empty ones where nothing of it is of text that the student wrote."""
    returns = {(task, one.name): one for task, objective in objectives.items() for one in objective.returns}
    compared = {key: one for key, one in returns.items() if one.baseline != "none"}
    found: dict[tuple[int, int, str], list[AnswerNumbers | None]] = {}
    for b, batch in enumerate(batches):
        for i, part in enumerate(batch.parts):
            own = [one for (task, _), one in compared.items() if task == part.task]
            if own:
                teacher = _teacher(part_of(part), batch, own, vocabulary_size=vocabulary_size, chunk_rows=chunk_rows)
                for one in own:
                    found[b, i, one.name] = _numbers(one, part, teacher)
    scopes = {}
    if compared:
        mine = [
            (batches[b].parts[i].task, name, one)
            for (b, i, name), answers in found.items()
            for one in answers
            if one is not None
        ]
        everyone = [one for of_rank in all_gather_objects(mine) for one in of_rank]
        scopes = {key: scopes_of(one for *whose, one in everyone if tuple(whose) == key) for key in compared}
    made: list[list[Columns]] = []
    for b, batch in enumerate(batches):
        made.append([])
        for i, part in enumerate(batch.parts):
            columns = dict(part.columns)
            for one in objectives[part.task].returns:
                answers = found.get((b, i, one.name), [None] * len(part.rewards))
                rewards = token_rewards(part.rewards, part.columns.get(REWARDS), part.row_sequences)
                of_step = scopes.get((part.task, one.name), {})
                columns |= one.columns(answers, of_step, rewards, part.row_sequences)
            made[-1].append(columns)
    return made


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
