"""Answers `dataset`: the dataset's own answers, which the teacher judges token by token."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from typing import ClassVar

from configs.answers import DatasetAnswers
from trainer.errors import DataError
from trainer.protocols import AnswerCollector, Author
from trainer.types import AnswerCounters, Collected, Prompt, RowText, Sequence


class AnswerSource(DatasetAnswers):
    """Every row needs an answer."""

    rewrite: ClassVar[bool] = False
    room_for_answer: ClassVar[int] = 0

    def bind(self, authors: Mapping[str, Author], *, seed: int) -> AnswerCollector:
        """`authors`: those who may write, by the name of a prompt's teacher. `seed`: of the task."""
        return GivenAnswers()


class GivenAnswers:
    """Prompts that have answers, unchanged."""

    async def collect(self, prompts: AbstractSequence[Prompt]) -> Collected:
        """The sequences of all answers. Raises `DataError` for a prompt without an answer."""
        return Collected(tuple(sequence for prompt in prompts for sequence in answers_of_dataset(prompt)))

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        """Nothing is written here."""


def answers_of_dataset(prompt: Prompt) -> list[Sequence]:
    """One sequence per answer of the row: of a preference the chosen one is sample 0, the rejected one sample 1, and of
    candidates each is a sample, in their order, with its score as its reward. Of a
    conversation that is no single text for its template, one per text."""
    if prompt.loss_mask is None:
        raise DataError(
            f"{prompt.origin}: has no answer; answers: teacher and teacher.generator: {{}} let the teacher write it"
        )
    first = RowText(prompt.token_ids, prompt.loss_mask, prompt.row_weights, prompt.reading, prompt.readings)
    return [
        Sequence(
            prompt.id,
            text.token_ids,
            text.loss_mask,
            author="dataset",
            sample=sample,
            task=prompt.task,
            teacher=prompt.teacher,
            teacher_weights=prompt.teacher_weights,
            weight=prompt.weight,
            row_weights=text.row_weights,
            is_turn=bool(prompt.turns),
            reward=None if prompt.scores is None else prompt.scores[sample],
            reading=text.reading,
            readings=text.readings,
        )
        for sample, text in enumerate((first, *prompt.turns, *prompt.alternatives))
    ]
