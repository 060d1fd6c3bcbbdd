"""A row as a prompt, a prompt with its answer as a sequence, and what a teacher reads in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from configs.section import MAIN
from trainer.types.cursor import AnswerCounters
from trainer.types.generation import sequence_id

WRITTEN = "rollout_logprobs"
"""The column of a sequence with what its author drew each token with: row i is the log-probability of token i + 1, 0 at
rows without loss."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Bytes of answers, and of digits in them, and how many of each the labels of a teacher reach."""

    num_bytes: int = 0
    aligned_bytes: int = 0
    num_digits: int = 0
    aligned_digits: int = 0

    def plus(self, other: Coverage) -> Coverage:
        return Coverage(
            self.num_bytes + other.num_bytes,
            self.aligned_bytes + other.aligned_bytes,
            self.num_digits + other.num_digits,
            self.aligned_digits + other.aligned_digits,
        )

    @property
    def byte_ratio(self) -> float:
        """1 where there is no byte."""
        return self.aligned_bytes / self.num_bytes if self.num_bytes else 1.0

    @property
    def digit_ratio(self) -> float | None:
        """None where there is no digit."""
        return self.aligned_digits / self.num_digits if self.num_digits else None


@dataclass(frozen=True, eq=False, slots=True)
class Reading:
    """What a teacher with a tokenizer and a template of its own reads in the place of a text, and of which of the
    text's rows its labels are (`trainer/align/`)."""

    token_ids: np.ndarray  # int32 [L'], the teacher's
    loss_mask: np.ndarray | None = None  # bool [L'], shifted: the n' rows that it is asked for; None: a prompt
    groups: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 [n], of each loss row of the text: rows of one number on both sides belong together; -1: has no label."""
    teacher_groups: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # int64 [n'], likewise
    num_groups: int = 0
    coverage: Coverage = Coverage()
    chunked: bool = False  # groups may have several rows of each side, and their labels are summed


@dataclass(frozen=True, slots=True)
class RowText:
    """One of the texts that a row becomes."""

    token_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray | None  # bool [L], shifted (module docstring); None: the answer is to be written
    row_weights: np.ndarray | None = None  # float32 [L], shifted: of each row in the row terms; None: all 1
    reading: Reading | None = None  # what the teacher reads instead, where it has another tokenizer
    readings: Mapping[str, Reading] = field(default_factory=dict)  # of each of several teachers, instead of `reading`


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a dataset, rendered and tokenised once.

    `loss_mask` is None where the answer still has to be written (`token_ids` is then the prompt alone, generation
    header included); otherwise `token_ids` is the whole text and the mask follows the shift of this module.
    """

    id: str  # "<epoch>:<row>", the same whatever the world size
    token_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray | None  # bool [L]
    origin: str  # "file:line" or "dataset[row]", for messages to people
    task: str = MAIN
    teacher: str = ""  # who is asked about it, several as in `Sequence`; empty where nobody is, or there is one teacher
    teacher_weights: Mapping[str, float] | None = None  # as in `Sequence`
    row_weights: np.ndarray | None = None  # float32 [L], as in `RowText`
    alternatives: tuple[RowText, ...] = ()  # further answers, which are compared with the first
    scores: tuple[float, ...] | None = None  # of the first answer and the further ones, where the row says them
    turns: tuple[RowText, ...] = ()  # further turns of a conversation that is no single text for its template
    weight: float = 1.0  # of its answers' rows in the row terms of the objective, `row_weights` apart
    reading: Reading | None = None  # as in `RowText`
    readings: Mapping[str, Reading] = field(default_factory=dict)  # likewise


@dataclass(frozen=True, slots=True)
class Sequence:
    """A full token row with the rows that count in the loss: one answer to one prompt."""

    prompt_id: str
    token_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L], shifted (module docstring)
    author: str  # of the answer: "dataset", or as in `Completion`
    sample: int = 0  # which of the answers to its prompt
    task: str = MAIN
    teacher: str = ""  # who scores it, several joined by TOGETHER; empty where nobody does, or there is one teacher
    teacher_weights: Mapping[str, float] | None = None  # of its own, where its row says them
    weight: float = 1.0  # of all its rows in the row terms of the objective
    row_weights: np.ndarray | None = None  # float32 [L], as in `RowText`; `weight` multiplies them
    is_turn: bool = False  # of a conversation of several sequences: `sample` counts its texts, each with its own prompt
    reward: float | None = None
    version: str = ""  # of the author's weights
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32 [L] each, shifted as the mask is
    reading: Reading | None = None  # as in `RowText`
    readings: Mapping[str, Reading] = field(default_factory=dict)  # likewise

    def of_teacher(self, name: str) -> Sequence:
        """As one teacher is asked about it."""
        return replace(self, teacher=name, reading=self.readings.get(name, self.reading))

    def as_read(self, teacher: str = "") -> Sequence:
        """As its teacher reads it, or of several this one: itself, unless that has another tokenizer."""
        reading = self.readings.get(teacher, self.reading)
        if reading is None:
            return self
        assert reading.loss_mask is not None, self.id
        return Sequence(
            self.prompt_id,
            reading.token_ids,
            reading.loss_mask,
            self.author,
            sample=self.sample,
            task=self.task,
            teacher=self.teacher,
            is_turn=self.is_turn,
        )

    @property
    def aligned_rows(self) -> np.ndarray | None:
        """bool [n], of its loss rows those that every teacher with another tokenizer says something of; None where
        there is no such teacher."""
        readings = [*self.readings.values()] or ([] if self.reading is None else [self.reading])
        return np.logical_and.reduce([one.groups >= 0 for one in readings]) if readings else None

    @property
    def id(self) -> str:
        """Unique in a step."""
        return sequence_id(self.prompt_id, self.sample)

    @property
    def group(self) -> tuple[str, str]:
        """Equal for the answers to one prompt of one task."""
        return self.task, self.id if self.is_turn else self.prompt_id

    @property
    def kind(self) -> tuple[str, str]:
        """Task and teacher, which all sequences of a unit share."""
        return self.task, self.teacher

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def spans(self) -> tuple[tuple[int, int], ...]:
        """The loss rows as half-open spans, in order: the answers of a multi-turn text are no suffix."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self.loss_mask.astype(np.int8), [0]])))
        return tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))


def tokens_to_read(sequence: Sequence) -> np.ndarray:
    """The tokens up to the one that the last label row predicts; what follows changes no label."""
    return sequence.token_ids[: int(np.flatnonzero(sequence.loss_mask)[-1]) + 2]


@dataclass(frozen=True, slots=True)
class Collected:
    """What was made of the prompts of one step."""

    sequences: tuple[Sequence, ...]  # in the order of the prompts; a prompt without a usable answer has none
    answers: AnswerCounters = field(default_factory=AnswerCounters)
    answers_by_task: Mapping[str, AnswerCounters] = field(default_factory=dict)  # of a whole step
    numbers: Mapping[str, float] = field(default_factory=dict)  # metrics of who wrote them
