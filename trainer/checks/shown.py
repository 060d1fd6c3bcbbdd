"""What a report shows of a run token by token, as it travels from the ranks to the run folder. Bounded.

Arrays follow the shift of `trainer/types.py`; log-probabilities are in nats, NaN is what nobody knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.types import SampleTokens


@dataclass(frozen=True, eq=False, slots=True)
class LabelRows:
    """What the labels of N rows say, at their temperature, beside the student's own distribution."""

    ids: np.ndarray  # int64 [N, M] of the teacher's vocabulary, its likeliest first; -1: no more
    teacher: np.ndarray  # float32 [N, M] log-probability in the label; of `sampled` labels log of the share of draws
    student: np.ndarray  # float32 [N, M] NaN: the student has no such token
    control: np.ndarray  # bool [N, M] kept whatever its probability
    num_kept: np.ndarray  # int64 [N] ids in the label; -1: all there are
    tail: np.ndarray  # float32 [N] the teacher's probability of all others
    student_tail: np.ndarray  # float32 [N] the student's of the same
    entropy: np.ndarray  # float32 [N] of the label, all ids that it does not keep as one event; in nats
    student_entropy: np.ndarray  # float32 [N] of all ids
    target: np.ndarray  # float32 [N] log-probability of the target id in the label
    student_target: np.ndarray  # float32 [N]
    kl: np.ndarray  # float32 [N] KL(teacher, student) over the events of the label


@dataclass(frozen=True, eq=False, slots=True)
class TrainedTokens:
    """A sequence that was trained on, or its beginning, with its labels of one teacher."""

    id: str
    step: int  # in which it was trained; the student is that after an evaluation of the same step
    task: str
    teacher: str  # its name, of several that became one distribution all; empty where a run has one
    labels: str  # the kind of encoding
    how: str  # the method of `align`; empty where the teacher has the student's tokenizer
    token_ids: np.ndarray  # int32 [L]
    rows: np.ndarray  # int64 [N] loss rows
    label: LabelRows
    groups: np.ndarray  # int64 [N], of an aligned one: rows of one number belong together, -1: has no label
    beside: tuple[
        np.ndarray, ...
    ] = ()  # [N], of an aligned one: int32 ids of the teacher's that stand for the same text


@dataclass(frozen=True, slots=True)
class First:
    """The likeliest id of a row: -1 for a token that the student has not."""

    id: int
    logprob: float


@dataclass(frozen=True, eq=False, slots=True)
class WorstToken:
    """A held-out row where student and teacher are far apart, with the text around the token that it predicts."""

    id: str  # of the text
    kl: float  # KL(teacher, student) in nats
    before: np.ndarray  # int32
    token: np.ndarray  # int32 [1]
    after: np.ndarray  # int32
    student_logprob: float  # of the token
    teacher_logprob: float | None  # None of a teacher with another tokenizer
    student_first: First
    teacher_first: First


@dataclass(frozen=True, slots=True)
class WorstText:
    """A held-out text where they are far apart in the mean."""

    kl: float  # mean of all its rows
    num_rows: int
    shown: SampleTokens  # or its beginning


@dataclass(frozen=True, slots=True)
class Worst:
    """Of the held-out rows, furthest first."""

    tokens: tuple[WorstToken, ...] = ()
    texts: tuple[WorstText, ...] = ()

    def cut(self, tokens: int, texts: int) -> Worst:
        """The furthest of them."""
        by_kl = [sorted(some, key=lambda one: -one.kl) for some in (self.tokens, self.texts)]
        return Worst(tuple(by_kl[0][:tokens]), tuple(by_kl[1][:texts]))
