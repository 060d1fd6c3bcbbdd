"""Elicitation `labeling`: the teacher writes the answers that are missing, then judges them token by token.

Sequence-level distillation (arXiv 1606.07947) where the student is trained on them with soft labels.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from trainer.elicitation.feature import answered_by_dataset
from trainer.errors import DataError
from trainer.protocols import Elicitation, Writers
from trainer.types import Prompt, Sequence


@dataclass(frozen=True)
class Strategy:
    """How the teacher writes; its writer replicas are started with these values. Rows that have answers keep them."""

    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    rewrite: bool = False

    needs_writer: ClassVar[bool] = True
    needs_answer: ClassVar[bool] = False

    @property
    def room_for_answer(self) -> int:
        """Tokens that must fit behind a prompt."""
        return self.max_new_tokens

    def bind(self, writers: Writers | None, *, end_of_turn_ids: Collection[int] = ()) -> Elicitation:
        """An answer that holds nothing but `end_of_turn_ids` counts as empty."""
        assert writers is not None, "labeling needs writer replicas"
        return WrittenAnswers(writers, rewrite=self.rewrite, end_of_turn_ids=end_of_turn_ids)


class WrittenAnswers:
    """Answers by the writers where the dataset has none. `dropped` counts prompts that were answered with nothing."""

    def __init__(self, writers: Writers, *, rewrite: bool, end_of_turn_ids: Collection[int]) -> None:
        self._writers = writers
        self._rewrite = rewrite
        self._end_of_turn_ids = frozenset(end_of_turn_ids)
        self.dropped = 0

    async def collect(self, prompts: AbstractSequence[Prompt]) -> list[Sequence]:
        """Sequences in the order of the prompts, without those whose answer is empty."""
        if self._rewrite and any(prompt.loss_mask is not None for prompt in prompts):
            raise DataError("rows reached the writers with their old answers: open the prompt stream with rewrite")
        wanting = [prompt for prompt in prompts if prompt.loss_mask is None]
        answers = await self._writers.write(wanting) if wanting else []
        written = {prompt.id: answer for prompt, answer in zip(wanting, answers, strict=True)}
        sequences = []
        for prompt in prompts:
            if prompt.loss_mask is not None:
                sequences.append(answered_by_dataset(prompt))
            elif self._end_of_turn_ids.issuperset(written[prompt.id].tolist()):
                self.dropped += 1
            else:
                sequences.append(answered_by_teacher(prompt, written[prompt.id]))
        return sequences


def answered_by_teacher(prompt: Prompt, answer: np.ndarray) -> Sequence:
    """Prompt and answer; the first answer token is predicted by the last row of the prompt."""
    token_ids = np.concatenate([prompt.token_ids, np.asarray(answer, dtype=np.int32)])
    loss_mask = np.zeros(len(token_ids), dtype=bool)
    loss_mask[len(prompt.token_ids) - 1 : -1] = True
    return Sequence(prompt.id, token_ids, loss_mask, provenance="teacher")
