"""Answers `teacher`: the teacher writes the answers that are missing, then judges them token by token.

Sequence-level distillation (arXiv 1606.07947) where the student is trained on them with soft labels.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as AbstractSequence

import numpy as np

from configs.answers import TeacherAnswers
from trainer.answers.dataset import answered_by_dataset
from trainer.errors import DataError
from trainer.protocols import AnswerCollector, Writers
from trainer.types import AnswerCounters, Collected, Prompt, Sequence

MIN_JUDGED = 20
"""Answers before their quality is judged."""


class AnswerSource(TeacherAnswers):
    """The generator replicas are started with these values."""

    @property
    def room_for_answer(self) -> int:
        """Tokens that must fit behind a prompt."""
        return self.max_new_tokens

    def bind(self, writers: Writers | None, *, end_of_turn_ids: Collection[int] = ()) -> AnswerCollector:
        """An answer that holds nothing but `end_of_turn_ids` counts as empty."""
        assert writers is not None, "answers: teacher needs generator replicas"
        return WrittenAnswers(writers, self, end_of_turn_ids=end_of_turn_ids)


class WrittenAnswers:
    """Answers by the writers where the dataset has none."""

    def __init__(self, writers: Writers, source: AnswerSource, *, end_of_turn_ids: Collection[int]) -> None:
        self._writers = writers
        self._source = source
        self._end_of_turn_ids = frozenset(end_of_turn_ids)

    async def collect(self, prompts: AbstractSequence[Prompt]) -> Collected:
        """Sequences in the order of the prompts, without those whose answer is left out."""
        if self._source.rewrite and any(prompt.loss_mask is not None for prompt in prompts):
            raise DataError("rows reached the writers with their old answers: open the prompt stream with rewrite")
        wanting = [prompt for prompt in prompts if prompt.loss_mask is None]
        answers = await self._writers.write(wanting) if wanting else []
        written = {prompt.id: answer for prompt, answer in zip(wanting, answers, strict=True)}
        sequences, counters = [], AnswerCounters()
        for prompt in prompts:
            if prompt.loss_mask is not None:
                sequences.append(answered_by_dataset(prompt))
                continue
            count = self._count(written[prompt.id].tolist())
            counters = counters.plus(count)
            if not count.dropped:
                sequences.append(answered_by_teacher(prompt, written[prompt.id]))
        return Collected(tuple(sequences), counters)

    def _count(self, answer: list[int]) -> AnswerCounters:
        """Of one answer. Where no end token is known, none is missing."""
        if self._end_of_turn_ids.issuperset(answer):
            return AnswerCounters(written=1, empty=1, dropped=1)
        cut_off = int(bool(self._end_of_turn_ids) and answer[-1] not in self._end_of_turn_ids)
        return AnswerCounters(written=1, cut_off=cut_off, dropped=cut_off * (self._source.on_cut_off == "drop"))

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        """See the protocol; the first few answers say too little, unless there are no more."""
        allowed = self._source.max_dropped_fraction
        if (answers.written < MIN_JUDGED and not last) or answers.dropped <= allowed * answers.written:
            return
        cut_off = answers.dropped - answers.empty
        also = f", {cut_off} cut off at max_new_tokens: {self._source.max_new_tokens}" if cut_off else ""
        raise DataError(
            f"{answers.dropped} of the {answers.written} answers that the teacher wrote could not be trained on "
            f"({answers.empty} empty{also}), more than answers.max_dropped_fraction: {allowed} allows. A teacher "
            "that says nothing was mostly asked with a chat template that is not its own (teacher.chat_template); "
            "answers that are cut off need a larger answers.max_new_tokens, or on_cut_off: keep"
        )


def answered_by_teacher(prompt: Prompt, answer: np.ndarray) -> Sequence:
    """Prompt and answer; the first answer token is predicted by the last row of the prompt."""
    token_ids = np.concatenate([prompt.token_ids, np.asarray(answer, dtype=np.int32)])
    loss_mask = np.zeros(len(token_ids), dtype=bool)
    loss_mask[len(prompt.token_ids) - 1 : -1] = True
    return Sequence(
        prompt.id,
        token_ids,
        loss_mask,
        author="teacher",
        task=prompt.task,
        teacher=prompt.teacher,
        weight=prompt.weight,
    )
