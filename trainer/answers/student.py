"""Answers `student`: the student writes, and the teacher judges what it wrote, token by token.

On-policy distillation (GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543): the student learns on the texts that it will
meet when it writes by itself. Labels and divergences are those of any other text: they are computed again with the
weights that are trained, so that no importance ratio is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from typing import ClassVar, cast

import numpy as np

from configs.answers import StudentAnswers
from trainer.errors import DataError
from trainer.protocols import AnswerCollector, Author, OnPolicy
from trainer.types import (
    WRITTEN,
    AnswerCounters,
    Collected,
    Completion,
    GenerationRequest,
    Prompt,
    Sampling,
    Sequence,
)

MIN_JUDGED = 20
"""Answers before their quality is judged."""


class AnswerSource(StudentAnswers):
    """Each request carries these values."""

    rewrite: ClassVar[bool] = True

    @property
    def room_for_answer(self) -> int:
        """Tokens that must fit behind a prompt."""
        return self.max_new_tokens

    def bind(self, authors: Mapping[str, Author], *, seed: int, student: Author) -> AnswerCollector:
        """See `trainer/answers/dataset.py`."""
        return StudentTexts(student, self, seed=seed)


class StudentTexts:
    """`n` answers of the student to each prompt."""

    def __init__(self, student: Author, source: AnswerSource, *, seed: int) -> None:
        self._writer = cast(OnPolicy, student.generators)
        self._stop_ids = student.stop_ids
        self._source = source
        self._sampling = Sampling(
            max_tokens=source.max_new_tokens,
            temperature=source.temperature,
            top_p=source.top_p,
            top_k=source.top_k,
            min_p=source.min_p,
            stop=source.stop,
            stop_token_ids=student.stop_ids,
            seed=seed if source.seed is None else source.seed,
        )

    async def collect(self, prompts: AbstractSequence[Prompt]) -> Collected:
        """Sequences in the order of the prompts and of their samples, without those that are left out. In the turn of
        a step (`trainer/loop/policy.py`)."""
        if any(prompt.loss_mask is not None for prompt in prompts):
            raise DataError("rows reached the student with their old answers: open the prompt stream with rewrite")
        asked = [(prompt, sample) for prompt in prompts for sample in range(self._source.n)]
        requests = [
            GenerationRequest(prompt.id, prompt.token_ids, self._sampling, sample=sample, origin=prompt.origin)
            for prompt, sample in asked
        ]
        written = await self._writer.generate(requests) if requests else []
        counts = [self._count(completion) for completion in written]
        kept = [
            answered_by_student(prompt, completion, sample=sample)
            for (prompt, sample), completion, count in zip(asked, written, counts, strict=True)
            if not count.dropped
        ]
        return Collected(tuple(kept), AnswerCounters.sum(counts), numbers=self._numbers(written))

    def _count(self, completion: Completion) -> AnswerCounters:
        """Of one answer. It is cut off only where the student could have ended it."""
        if self._writer.staleness(completion) > self._writer.max_staleness:
            return AnswerCounters(written=1, stale=1, dropped=1)
        if set(self._stop_ids).issuperset(completion.token_ids.tolist()):
            return AnswerCounters(written=1, empty=1, dropped=1)
        cut_off = int(completion.finish_reason != "stop" and bool(self._stop_ids or self._source.stop))
        return AnswerCounters(written=1, cut_off=cut_off, dropped=cut_off * (self._source.on_cut_off == "drop"))

    def _numbers(self, written: AbstractSequence[Completion]) -> dict[str, float]:
        if not written:
            return {}
        ages = [self._writer.staleness(completion) for completion in written]
        logprobs = np.concatenate([completion.logprobs for completion in written])
        return {
            "rollout/tokens": float(sum(len(completion.token_ids) for completion in written)),
            "rollout/staleness_mean": float(np.mean(ages)),
            "rollout/staleness_max": float(max(ages)),
            "rollout/truncated": float(np.mean([completion.finish_reason != "stop" for completion in written])),
            "rollout/logprob": float(logprobs.mean()) if len(logprobs) else 0.0,
        }

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        """See the protocol; the first few answers say too little, unless there are no more."""
        allowed = self._source.max_dropped_fraction
        if (answers.written < MIN_JUDGED and not last) or answers.dropped <= allowed * answers.written:
            return
        cut_off = answers.dropped - answers.empty - answers.stale
        also = f", {cut_off} cut off at max_new_tokens: {self._source.max_new_tokens}" if cut_off else ""
        stale = f", {answers.stale} too old" if answers.stale else ""
        raise DataError(
            f"{answers.dropped} of the {answers.written} answers that the student wrote could not be trained on "
            f"({answers.empty} empty{also}{stale}), more than answers.max_dropped_fraction: {allowed} allows. A "
            "student that says nothing is better trained on rows with answers first (answers: dataset); answers "
            "that are cut off need a larger answers.max_new_tokens, or on_cut_off: keep"
        )


def answered_by_student(prompt: Prompt, completion: Completion, *, sample: int) -> Sequence:
    """Prompt and answer; the first answer token is predicted by the last row of the prompt."""
    token_ids = np.concatenate([prompt.token_ids, completion.token_ids])
    rows = slice(len(prompt.token_ids) - 1, len(token_ids) - 1)
    loss_mask, logprobs = np.zeros(len(token_ids), dtype=bool), np.zeros(len(token_ids), dtype=np.float32)
    loss_mask[rows], logprobs[rows] = True, completion.logprobs
    return Sequence(
        prompt.id,
        token_ids,
        loss_mask,
        author=completion.author,
        sample=sample,
        task=prompt.task,
        teacher=prompt.teacher,
        teacher_weights=prompt.teacher_weights,
        weight=prompt.weight,
        version=completion.versions[0][1],
        columns={WRITTEN: logprobs},
    )
