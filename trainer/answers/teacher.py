"""Answers `teacher`: the teacher writes the answers that are missing, then judges them token by token.

Sequence-level distillation (arXiv 1606.07947) where the student is trained on them with soft labels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING

import numpy as np

from configs.answers import TeacherAnswers
from trainer.answers.dataset import answers_of_dataset
from trainer.errors import DataError
from trainer.protocols import AnswerCollector, Author
from trainer.types import (
    AnswerCounters,
    Collected,
    Completion,
    GenerationRequest,
    Prompt,
    RowText,
    Sampling,
    Sequence,
)

if TYPE_CHECKING:
    from trainer.align.texts import TextAligner

MIN_JUDGED = 20
"""Answers before their quality is judged."""


class AnswerSource(TeacherAnswers):
    """Each request carries these values."""

    @property
    def room_for_answer(self) -> int:
        """Tokens that must fit behind a prompt."""
        return self.max_new_tokens

    def bind(self, authors: Mapping[str, Author], *, seed: int) -> AnswerCollector:
        """See `trainer/answers/dataset.py`."""
        return WrittenAnswers(authors, self, seed=seed)


class WrittenAnswers:
    """Answers by the teachers where the dataset has none."""

    def __init__(self, authors: Mapping[str, Author], source: AnswerSource, *, seed: int) -> None:
        self._authors = authors
        self._source = source
        self._sampling = {
            name: Sampling(
                max_tokens=source.max_new_tokens,
                temperature=source.temperature,
                top_p=source.top_p,
                top_k=source.top_k,
                min_p=source.min_p,
                stop=source.stop,
                stop_token_ids=author.stop_ids,
                seed=seed if source.seed is None else source.seed,
            )
            for name, author in authors.items()
        }

    async def collect(self, prompts: AbstractSequence[Prompt]) -> Collected:
        """Sequences in the order of the prompts and of their samples, without those whose answer is left out."""
        if self._source.rewrite and any(prompt.loss_mask is not None for prompt in prompts):
            raise DataError("rows reached the generators with their old answers: open the prompt stream with rewrite")
        asked = [prompt for prompt in prompts if prompt.loss_mask is None]
        written = await write_answers(asked, self._authors, self._sampling, n=self._source.n)
        sequences, counters = [], AnswerCounters()
        for prompt in prompts:
            if prompt.loss_mask is not None:
                sequences += answers_of_dataset(prompt)
                continue
            for sample in range(self._source.n):
                completion = written[prompt.id, sample]
                count = self._count(completion, self._authors[prompt.teacher])
                counters = counters.plus(count)
                if count.dropped:
                    continue
                aligner = self._authors[prompt.teacher].aligner
                try:
                    sequences.append(answered_by_teacher(prompt, completion, sample=sample, aligner=aligner))
                except DataError:  # nothing of it belongs to a token of the student
                    counters = counters.plus(AnswerCounters(empty=1, dropped=1))
        return Collected(tuple(sequences), counters)

    def _count(self, completion: Completion, author: Author) -> AnswerCounters:
        """Of one answer. It is cut off only where the teacher could have ended it."""
        if set(author.stop_ids).issuperset(completion.token_ids.tolist()):
            return AnswerCounters(written=1, empty=1, dropped=1)
        cut_off = int(completion.finish_reason != "stop" and bool(author.stop_ids or self._source.stop))
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


async def write_answers(
    prompts: AbstractSequence[Prompt], authors: Mapping[str, Author], sampling: Mapping[str, Sampling], *, n: int
) -> dict[tuple[str, int], Completion]:
    """`n` answers to each prompt, by the prompt's id and their number. Each teacher writes those to its own prompts;
    `authors` and `sampling` are by the name of a prompt's teacher."""
    asked: dict[str, list[GenerationRequest]] = {}
    for prompt in prompts:
        asked.setdefault(prompt.teacher, []).extend(
            GenerationRequest(
                prompt.id, asked_ids(prompt), sampling[prompt.teacher], sample=sample, origin=prompt.origin
            )
            for sample in range(n)
        )
    answered = await asyncio.gather(*(authors[name].generators.generate(asked[name]) for name in asked))
    return {
        (request.prompt_id, request.sample): completion
        for requests, completions in zip(asked.values(), answered, strict=True)
        for request, completion in zip(requests, completions, strict=True)
    }


def asked_ids(prompt: Prompt) -> np.ndarray:
    """What a generator reads of a prompt, by its own tokenizer."""
    return prompt.token_ids if prompt.reading is None else prompt.reading.token_ids


def answered_by_teacher(
    prompt: Prompt, completion: Completion, *, sample: int = 0, aligner: TextAligner | None = None
) -> Sequence:
    """Prompt and answer; the first answer token is predicted by the last row of the prompt. `aligner` of a teacher with
    another tokenizer; raises `DataError` where nothing of its answer can be aligned."""
    if aligner is not None:
        assert prompt.reading is not None, prompt.id
        text = aligner.answered(RowText(prompt.token_ids, None), prompt.reading, completion)
    else:
        token_ids = np.concatenate([prompt.token_ids, completion.token_ids])
        loss_mask = np.zeros(len(token_ids), dtype=bool)
        loss_mask[len(prompt.token_ids) - 1 : -1] = True
        text = RowText(token_ids, loss_mask)
    return Sequence(
        prompt.id,
        text.token_ids,
        text.loss_mask,
        author=completion.author,
        sample=sample,
        task=prompt.task,
        teacher=prompt.teacher,
        weight=prompt.weight,
        version=completion.versions[-1][1],
        reading=text.reading,
    )
