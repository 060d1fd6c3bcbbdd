"""Answers `dataset`: the dataset's own answers, which the teacher judges token by token."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as AbstractSequence
from typing import ClassVar

from configs.answers import DatasetAnswers
from trainer.errors import DataError
from trainer.protocols import AnswerCollector, Writers
from trainer.types import AnswerCounters, Collected, Prompt, Sequence


class AnswerSource(DatasetAnswers):
    """Every row needs an answer."""

    rewrite: ClassVar[bool] = False
    room_for_answer: ClassVar[int] = 0

    def bind(self, writers: Writers | None, *, end_of_turn_ids: Collection[int] = ()) -> AnswerCollector:
        return GivenAnswers()


class GivenAnswers:
    """Prompts that have answers, unchanged."""

    async def collect(self, prompts: AbstractSequence[Prompt]) -> Collected:
        """One sequence per prompt. Raises `DataError` for a prompt without an answer."""
        return Collected(tuple(answered_by_dataset(prompt) for prompt in prompts))

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        """Nothing is written here."""


def answered_by_dataset(prompt: Prompt) -> Sequence:
    """The sequence of a prompt that came with its answer."""
    if prompt.loss_mask is None:
        raise DataError(
            f"{prompt.origin}: has no answer; answers: teacher and teacher.generator: {{}} let the teacher write it"
        )
    return Sequence(
        prompt.id, prompt.token_ids, prompt.loss_mask, author="dataset", task=prompt.task, teacher=prompt.teacher
    )
