"""The row mathematics of an evaluation: exact, over the full vocabulary, whatever the labels of the training are.

One file for the rows of a rank and for adding ranks up, so that what is reported as KL is never a top-k bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace

import torch

from trainer.align.aligner import SharedIds
from trainer.labels.encoding import ABSENT
from trainer.losses.ensemble import Mix, probability_mean
from trainer.losses.kl import forward_kl
from trainer.model.fast import cache_blocks
from trainer.model.head import Head, HeadShape
from trainer.types import Evaluation, PairedLogProbs


@dataclass(frozen=True, slots=True)
class EvaluationRows:
    """Per loss row, on the device; log-probabilities of the target id. M is N, or 0 where no teacher scored the rows;
    of a teacher with another tokenizer the number of aligned rows, where KL and agreement are over the ids that both
    vocabularies have and one event of all others."""

    kl: torch.Tensor  # float32 [M] KL(teacher, student) in nats
    agree: torch.Tensor  # bool [M] both argmax are equal
    student_logprob: torch.Tensor  # float32 [N]
    teacher_logprob: torch.Tensor  # float32 [M]; 0 of a teacher with another tokenizer, whose target ids are others
    padding_mass: torch.Tensor  # float32 [N] of the student's softmax over all its rows, beyond the vocabulary
    student_entropy: torch.Tensor  # float32 [N] in nats, of the whole vocabulary
    teacher_entropy: torch.Tensor  # float32 [M] likewise, of the teacher's own
    student_first: torch.Tensor  # int64 [N] the likeliest id
    student_first_logprob: torch.Tensor  # float32 [N]
    teacher_first: torch.Tensor  # int64 [M] likewise, of the student's vocabulary: -1 for a token that it lacks
    teacher_first_logprob: torch.Tensor  # float32 [M]
    kl_to_each: torch.Tensor  # float32 [M, T] as kl, of each of T teachers that were asked together; T is 0 of one

    @classmethod
    def empty(cls, like: torch.Tensor, num_rows: int, *, num_scored: int, num_together: int = 0) -> EvaluationRows:
        """To be filled, on the device of `like`."""
        return cls(
            kl=like.new_empty(num_scored, dtype=torch.float32),
            agree=like.new_empty(num_scored, dtype=torch.bool),
            student_logprob=like.new_zeros(num_rows, dtype=torch.float32),
            teacher_logprob=like.new_empty(num_scored, dtype=torch.float32),
            padding_mass=like.new_zeros(num_rows, dtype=torch.float32),
            student_entropy=like.new_zeros(num_rows, dtype=torch.float32),
            teacher_entropy=like.new_empty(num_scored, dtype=torch.float32),
            student_first=like.new_zeros(num_rows, dtype=torch.int64),
            student_first_logprob=like.new_zeros(num_rows, dtype=torch.float32),
            teacher_first=like.new_zeros(num_scored, dtype=torch.int64),
            teacher_first_logprob=like.new_zeros(num_scored, dtype=torch.float32),
            kl_to_each=like.new_empty(num_scored, num_together, dtype=torch.float32),
        )


@dataclass(frozen=True, slots=True)
class StudentHead:
    """The head of a student: its rows of the vocabulary, and those beyond it, where it has any."""

    inside: Head
    padding: Head | None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, shape: HeadShape, vocabulary_size: int) -> StudentHead:
        rest = None
        if (num_rows := weight.shape[0] - vocabulary_size) > 0:
            rest = Head(weight[vocabulary_size:], None if bias is None else bias[vocabulary_size:], shape, num_rows)
        return cls(Head(weight, bias, shape, vocabulary_size), rest)


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """What a teacher said of the rows."""

    hidden: torch.Tensor  # [N, H of the teacher]
    head: Head
    shared: SharedIds | None = None  # with the student's vocabulary, where the teacher has another
    aligned: torch.Tensor | None = None  # bool [N]: rows that the teacher said something of, likewise


@dataclass(frozen=True, slots=True)
class TeachersTogether:
    """What several said of the same rows, and how they become the one that the student is compared with."""

    states: tuple[TeacherStates, ...]
    weights: tuple[torch.Tensor, ...]  # float32 [N, 1] of each
    mix: Mix = probability_mean
    aligned: torch.Tensor | None = None
    """bool [N]: rows that all of them said something of, where each has a tokenizer of its own: then the ids that they
    share with the student are those that all have, in one order."""

    def mixed(self, logprobs: AbstractSequence[torch.Tensor], rows: slice) -> torch.Tensor:
        """Log-probabilities [n, V] of each at these rows -> of all together."""
        return self.mix(logprobs, [weight[rows] for weight in self.weights])


@torch.no_grad()
def evaluation_rows(
    hidden: torch.Tensor,
    head: StudentHead,
    target_ids: torch.Tensor,
    teacher: TeacherStates | TeachersTogether | None,
    *,
    chunk_rows: int = 512,
) -> EvaluationRows:
    """Student hidden [N, H] against what the teacher said of the same rows, at temperature 1.

    Logits are computed in the dtype of each head and compared in float32; a tensor [chunk_rows, V] of the student and
    one of each teacher exist at a time. All columns but `padding_mass` are of the distributions inside the vocabulary.
    """
    n = hidden.shape[0]
    together = teacher if isinstance(teacher, TeachersTogether) else None
    states = together.states if together else () if teacher is None else (teacher,)
    rows = EvaluationRows.empty(hidden, n, num_scored=n if states else 0, num_together=len(states) if together else 0)
    for start in range(0, n, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, n))
        products = head.inside.product(hidden[chunk])
        of_teachers = [one.head.product(one.hidden[chunk]) for one in states]
        padding = None if head.padding is None else head.padding.product(hidden[chunk])
        for block in cache_blocks(products):
            place = slice(start + block.start, start + block.stop)
            logits = head.inside.shape.apply(products[block].float())
            student = logits.log_softmax(1)
            rows.student_logprob[place] = student.gather(1, target_ids[place, None])[:, 0]
            rows.student_entropy[place] = entropy(student)
            rows.student_first_logprob[place], rows.student_first[place] = student.max(1)
            scored = [
                one.head.shape.apply(product[block].float()).log_softmax(1)
                for one, product in zip(states, of_teachers, strict=True)
            ]
            if together:
                pairs = [_pair(student, said, one.shared) for said, one in zip(scored, states, strict=True)]
                rows.kl_to_each[place] = torch.stack([forward_kl(pair) for pair in pairs], 1)
                mixed = replace(pairs[0], teacher=together.mixed([pair.teacher for pair in pairs], place))
                _compare_mixed(rows, place, mixed, target_ids[place, None], states[0].shared)
            elif scored:
                rows.teacher_entropy[place] = entropy(scored[0])
                _compare(rows, place, student, scored[0], target_ids[place, None], states[0].shared)
            if padding is not None:
                inside = logits[:, 0] - student[:, 0]  # log-sum-exp
                outside = head.padding.shape.apply(padding[block].float()).logsumexp(1)
                rows.padding_mass[place] = (outside - inside).sigmoid()
    if teacher is None or teacher.aligned is None:
        return rows
    names = (*_OF_TEACHER, "teacher_first", "teacher_first_logprob", "kl_to_each")
    return replace(rows, **{name: getattr(rows, name)[teacher.aligned] for name in names})


def _pair(student: torch.Tensor, teacher: torch.Tensor, shared: SharedIds | None) -> PairedLogProbs:
    """Of log-probabilities [n, V] of the vocabulary of each."""
    return PairedLogProbs(student, teacher, exhaustive=True) if shared is None else shared.pair(student, teacher)


def _compare_mixed(
    rows: EvaluationRows, place: slice, mixed: PairedLogProbs, ids: torch.Tensor, shared: SharedIds | None
) -> None:
    """Of several teachers that became one: over the events that they have in common."""
    rows.teacher_entropy[place] = entropy(mixed.teacher)
    if shared is None:
        _compare(rows, place, mixed.student, mixed.teacher, ids, None)
        return
    logprob, first = mixed.teacher.max(1)
    rows.teacher_first_logprob[place] = logprob
    rows.teacher_first[place] = torch.cat([shared.student_ids, shared.student_ids.new_full((1,), -1)])[first]
    rows.kl[place] = forward_kl(mixed)
    rows.teacher_logprob[place] = 0.0
    rows.agree[place] = rows.student_first[place] == rows.teacher_first[place]


def _compare(
    rows: EvaluationRows,
    place: slice,
    student: torch.Tensor,
    teacher: torch.Tensor,
    ids: torch.Tensor,
    shared: SharedIds | None,
) -> None:
    """Log-probabilities of the rows at `place`, float32 [n, V] of the vocabulary of each."""
    logprob, first = teacher.max(1)
    rows.teacher_first_logprob[place] = logprob
    if shared is not None:
        rows.kl[place] = forward_kl(_pair(student, teacher, shared))
        rows.teacher_first[place] = shared.of_teacher[first]
        rows.teacher_logprob[place] = 0.0
    else:
        rows.kl[place] = forward_kl(PairedLogProbs(student, teacher, exhaustive=True))
        rows.teacher_first[place] = first
        rows.teacher_logprob[place] = teacher.gather(1, ids)[:, 0]
    rows.agree[place] = rows.student_first[place] == rows.teacher_first[place]


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """[n] in nats, of log-probabilities [n, V]; what has none counts for nothing."""
    return -(logprobs.exp() * logprobs.clamp(min=ABSENT)).sum(1)


_OF_TEACHER = ("kl", "agree", "teacher_logprob", "teacher_entropy")
_SUMMED = (*_OF_TEACHER, "student_logprob", "padding_mass", "student_entropy")
"""Columns of `EvaluationRows`, in the order of the sums."""


@dataclass(frozen=True, slots=True)
class EvaluationSums:
    """What ranks add up: float64 sums over rows."""

    num_rows: float
    num_scored: float  # rows that a teacher scored
    kl: float
    agree: float
    teacher_logprob: float
    teacher_entropy: float
    student_logprob: float
    padding_mass: float
    student_entropy: float
    aligned: float = 0.0  # scored rows of teachers with another tokenizer
    kl_to_each: Mapping[str, float] = field(default_factory=dict)  # of teachers that were asked together

    @classmethod
    def of(cls, rows: EvaluationRows, teachers: AbstractSequence[str] = (), *, aligned: bool = False) -> EvaluationSums:
        """`teachers`: the names of those that were asked together; `aligned`: one was, with another tokenizer."""
        sums = (float(getattr(rows, name).double().sum()) for name in _SUMMED)
        to_each = rows.kl_to_each.double().sum(0).tolist()
        each = dict(zip(teachers, to_each, strict=True)) if to_each else {}
        scored = float(len(rows.kl))
        return cls(float(len(rows.student_logprob)), scored, *sums, scored if aligned else 0.0, each)

    @classmethod
    def combine(cls, parts: Iterable[EvaluationSums]) -> EvaluationSums:
        """The sums over all parts (micro-batches, ranks, tasks); zeros for none."""
        parts = list(parts)
        names = ("num_rows", "num_scored", *_SUMMED, "aligned")
        teachers = dict.fromkeys(name for part in parts for name in part.kl_to_each)
        each = {name: math.fsum(part.kl_to_each.get(name, 0.0) for part in parts) for name in teachers}
        return cls(*(math.fsum(getattr(part, name) for part in parts) for name in names), each)

    def result(self, step: int) -> Evaluation:
        """Means over all rows; those about a teacher over the rows that one scored, None where there is none. Raises
        `ValueError` where there is no row: a mean of nothing is no zero."""
        if not self.num_rows:
            raise ValueError("an evaluation needs at least one held-out loss row, got none")
        scored = self.num_scored
        return Evaluation(
            step=step,
            num_rows=int(self.num_rows),
            forward_kl=self.kl / scored if scored else None,
            agreement=self.agree / scored if scored else None,
            perplexity=_exp(-self.student_logprob / self.num_rows),
            teacher_perplexity=_exp(-self.teacher_logprob / scored) if scored and not self.aligned else None,
            aligned_rows=int(self.aligned) if self.aligned else None,
            padding_mass=self.padding_mass / self.num_rows,
            student_entropy=self.student_entropy / self.num_rows,
            teacher_entropy=self.teacher_entropy / scored if scored else None,
            teachers={name: value / scored for name, value in self.kl_to_each.items()},
        )


def _exp(nats: float) -> float:
    """exp that answers inf where Python raises: an untrained or diverged student may be that bad."""
    return math.exp(nats) if nats < 700 else math.inf
