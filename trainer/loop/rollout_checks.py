"""What text of the student must carry where a term learns from its sampled tokens, asked before anything is scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from trainer.errors import DataError
from trainer.losses.returns import REWARDS
from trainer.types import WRITTEN, Sequence


def check_rollouts(sequences: Iterable[Sequence], learns_rewards: Mapping[str, bool]) -> None:
    """Raises `DataError` naming the answer and the row. `learns_rewards`: the tasks with such terms, and whether a term
    of theirs raises a verifier's reward."""
    for sequence in sequences:
        if sequence.task not in learns_rewards:
            continue
        problem = _problem(sequence, rewards=learns_rewards[sequence.task])
        if problem is not None:
            prompt = f"prompt {sequence.prompt_id} (epoch:row)"
            raise DataError(f"answer {sequence.sample} to {prompt}, written by {sequence.author}: {problem}")


def _problem(sequence: Sequence, *, rewards: bool) -> str | None:
    columns = sequence.columns
    if WRITTEN not in columns:
        return f"it has no column {WRITTEN}, and only text that the student wrote can be learnt as a sample of it"
    for name in (WRITTEN, *((REWARDS,) if REWARDS in columns and rewards else ())):
        column = np.asarray(columns[name])
        if column.shape != (sequence.num_tokens,):
            return f"its column {name} has {len(column)} numbers, and it has {sequence.num_tokens} tokens"
        bad = np.flatnonzero(sequence.loss_mask & ~np.isfinite(column))
        if len(bad):
            return f"its column {name} is {column[bad[0]]} in row {bad[0]}, the prediction of token {bad[0] + 1}"
    if not rewards:
        return None
    if sequence.reward is None and REWARDS not in columns:
        return (
            f"nobody gave it a reward, neither a number nor a column {REWARDS}: remove reward_weight, or add a reward"
        )
    if sequence.reward is not None and not np.isfinite(sequence.reward):
        return f"its reward is {sequence.reward}"
    return None
