"""Rewards of answers, given in the controller before the teacher judges their tokens.

    collector --sequences--> Answer (row, text, ids) --score of a built-in or a user's class--> the sequences' `reward`

The class `Reward` of a user's file derives from `configs.rewards.Reward`, declares its parameters as fields, and has

    def score(self, answers: Sequence[Answer]) -> list[float]

which is called in a thread with all answers of a step at once, and gives a finite number for each, in their order.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import DataError, foreign_errors
from trainer.threads import in_thread
from trainer.types import AnswerCounters, Collected, Prompt, Sequence

if TYPE_CHECKING:
    from configs.rewards import Reward
    from trainer.protocols import AnswerCollector


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a row."""

    row: Mapping[str, Any]  # as the dataset has it, a gold answer and whatever else with it
    text: str  # of the answer, without special tokens
    token_ids: np.ndarray  # int32, of the answer, its end token included
    sample: int  # which of the answers to its row
    origin: str  # "file:line" or "dataset[row]"


class Rewarded:
    """A collector whose sequences have rewards."""

    def __init__(
        self,
        collector: AnswerCollector,
        reward: Reward,
        *,
        row_of: Callable[[Prompt], Mapping[str, Any]],
        decode: Callable[[np.ndarray], str],
    ) -> None:
        """`reward` is the object behind the kind, `decode` makes text of ids."""
        self._collector, self._reward = collector, reward
        self._row_of, self._decode = row_of, decode

    async def collect(self, prompts: AbstractSequence[Prompt]) -> Collected:
        """Raises `DataError` naming the row where the function does not give every answer a number."""
        collected = await self._collector.collect(prompts)
        by_id = {prompt.id: prompt for prompt in prompts}
        answers = [self._answer(sequence, by_id[sequence.prompt_id]) for sequence in collected.sequences]
        if not answers:
            return collected
        rewards = checked(self._reward.kind, answers, await self._score(answers))
        sequences = tuple(
            replace(sequence, reward=reward) for sequence, reward in zip(collected.sequences, rewards, strict=True)
        )
        return replace(collected, sequences=sequences)

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        """As the collector does."""
        self._collector.judge(answers, last=last)

    def _answer(self, sequence: Sequence, prompt: Prompt) -> Answer:
        token_ids = sequence.token_ids[int(np.flatnonzero(sequence.loss_mask)[0]) + 1 :]
        return Answer(self._row_of(prompt), self._decode(token_ids), token_ids, sequence.sample, prompt.origin)

    async def _score(self, answers: AbstractSequence[Answer]) -> Any:
        called = f"reward: {self._reward.kind} failed on {_told(answers)}"
        try:
            async with asyncio.timeout(self._reward.timeout_s):
                with foreign_errors(called, error=DataError):
                    return await in_thread(self._reward.score, answers)
        except TimeoutError:
            limit = f"no answer within reward.timeout_s: {self._reward.timeout_s:g}"
            raise DataError(f"{called}: {limit}") from None


def checked(kind: str, answers: AbstractSequence[Answer], rewards: Any) -> list[float]:
    """What a function gave, if it is a finite number for each answer. Raises `DataError`."""
    if isinstance(rewards, str | bytes | Mapping) or not hasattr(rewards, "__len__"):
        raise DataError(f"reward: {kind} gave {type(rewards).__name__}: write a list with a number for each answer")
    if len(rewards) != len(answers):
        raise DataError(
            f"reward: {kind} gave {len(rewards)} numbers for {len(answers)} answers ({_told(answers)}): write one for "
            "each, in their order"
        )
    numbers = []
    for answer, reward in zip(answers, rewards, strict=True):
        try:
            numbers.append(float(reward))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            what = f"reward: {kind} gave {reward!r} to answer {answer.sample}, {answer.text[:80]!r}"
            raise DataError(f"{answer.origin}: {what}: write a finite number")
    return numbers


def _told(answers: AbstractSequence[Answer]) -> str:
    """Which they are."""
    more = f" and {len(answers) - 1} more" if len(answers) > 1 else ""
    return f"answer {answers[0].sample} to {answers[0].origin}{more}"
