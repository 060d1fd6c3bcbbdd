"""A kind of answers of a user's own: of `n` answers to a prompt, the one that its teacher finds likeliest per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from configs.answers import Answers
from trainer.answers.teacher import answered_by_teacher, write_answers
from trainer.protocols import Author
from trainer.types import AnswerCounters, Collected, Prompt, Sampling


class AnswerSource(Answers):
    kind: str = "fakes.best_of"
    n: int = 4
    max_tokens: int = 8

    needs_generator: ClassVar[bool] = True
    needs_answer: ClassVar[bool] = False
    rewrite: ClassVar[bool] = True

    @property
    def room_for_answer(self) -> int:
        return self.max_tokens

    def bind(self, authors: Mapping[str, Author], *, seed: int) -> BestOf:
        return BestOf(self, authors, seed)


class BestOf:
    def __init__(self, source: AnswerSource, authors: Mapping[str, Author], seed: int) -> None:
        self._source, self._authors = source, authors
        self._sampling = {
            name: Sampling(source.max_tokens, temperature=1.0, stop_token_ids=author.stop_ids, seed=seed)
            for name, author in authors.items()
        }

    async def collect(self, prompts: Sequence[Prompt]) -> Collected:
        n = self._source.n
        written = await write_answers(prompts, self._authors, self._sampling, n=n)
        sequences = []
        for prompt in prompts:
            best = max(range(n), key=lambda sample: written[prompt.id, sample].logprobs.mean())
            sequences.append(answered_by_teacher(prompt, written[prompt.id, best], sample=best))
        return Collected(tuple(sequences), AnswerCounters(written=n * len(prompts)))

    def judge(self, answers: AnswerCounters, *, last: bool) -> None: ...
