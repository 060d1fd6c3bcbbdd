"""What the labels of a row say and what the student says of the same ids, as a report shows it.

All that is said of encodings comes from their pairs, so that one of a user's is shown as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.nn import functional

from trainer.align.aligner import SharedIds
from trainer.checks.evaluate import entropy
from trainer.checks.shown import LabelRows
from trainer.labels.encoding import ABSENT, ALIGNED, Encoding
from trainer.labels.token import LOGPROB
from trainer.losses.ensemble import Together, columns_of
from trainer.losses.kl import forward_kl
from trainer.model.head import Head
from trainer.types import BatchPart, PairedLogProbs, TokenBatch

LIKELIEST = 5
"""Ids of a row; control ids and the target id come on top of them."""
MAX_IDS = 12
_CHUNK = 64  # rows: a few tensors [rows, V] exist at a time
_ALWAYS = 1e6  # above every log-probability


@dataclass(frozen=True, slots=True)
class PartLabels:
    """By what the labels of a part are read."""

    encoding: Encoding | Together  # as the teacher made them, whatever the alignment
    head: Head | None
    shared: SharedIds | None = None  # with a teacher's other vocabulary
    aligned: Encoding | None = None  # what a divergence sees of them, where it is a distribution over shared ids
    how: str = ""  # the method of `align`

    def of_teachers(self, teacher: str) -> Iterator[tuple[str, Encoding | Together, Callable, Head | None]]:
        """Name, encoding, columns out of those of the part, head: of each distribution that training sees."""
        encoding = self.encoding
        if isinstance(encoding, Together) and encoding.how == "per_teacher":
            for name in encoding.teachers:
                yield (
                    name,
                    encoding.encoding_of(name),
                    lambda labels, name=name: columns_of(labels, name),
                    encoding.heads.get(name),
                )
        else:
            yield teacher, encoding, dict, self.head


@torch.no_grad()
def shown_rows(
    hidden: torch.Tensor, head: Head, batch: TokenBatch, labels_of: Callable[[BatchPart], PartLabels | None]
) -> list[list[tuple[str, LabelRows]]]:
    """Of each part (name of teacher, its rows), for every distribution of it; hidden [N, H] of the student. Empty for a
    part without labels."""
    found = []
    for part in batch.parts:
        known = labels_of(part) if part.labels else None
        found.append([] if known is None else list(_of_part(hidden, head, batch.target_ids, part, known)))
    return found


def _of_part(
    hidden: torch.Tensor, head: Head, target_ids: torch.Tensor, part: BatchPart, known: PartLabels
) -> Iterator[tuple[str, LabelRows]]:
    starts = range(part.rows.start, part.rows.stop, _CHUNK)
    for name, encoding, columns, teacher_head in known.of_teachers(part.teacher):
        chunks = []
        for start in starts:
            rows = slice(start, min(start + _CHUNK, part.rows.stop))
            own = slice(rows.start - part.rows.start, rows.stop - part.rows.start)
            labels = columns({key: column[own] for key, column in part.labels.items()})
            logits = head.shape.apply(head.product(hidden[rows]).float())
            chunks.append(label_rows(logits, labels, target_ids[rows], encoding, teacher_head, known))
        yield name, LabelRows(*(np.concatenate(columns) for columns in zip(*chunks, strict=True)))


def label_rows(
    logits: torch.Tensor,
    labels: Mapping[str, torch.Tensor],
    target_ids: torch.Tensor,
    encoding: Encoding | Together,
    head: Head | None,
    known: PartLabels,
) -> tuple[np.ndarray, ...]:
    """The columns of `LabelRows` of n rows: student logits float32 [n, V], the encoding's columns of the same rows."""
    shared = known.shared
    student = (logits / encoding.temperature).log_softmax(1)
    own_target = student.gather(1, target_ids[:, None])[:, 0]
    student_entropy = entropy(student)
    if LOGPROB in labels:
        return _of_token(labels[LOGPROB][:, 0], own_target, student_entropy, target_ids)
    seen = logits if shared is None else logits.new_zeros(len(logits), shared.num_teacher)
    pair = encoding.align(seen, encoding.prepare(labels, head), head)
    events = _Events.of(pair, shared)
    ids, teacher, control = events.likeliest(control_of(encoding), target_ids if shared is None else None)
    theirs = events.of_student(student, ids)
    if pair.exhaustive:
        tail = student_tail = torch.zeros_like(own_target)
    else:
        tail = labels["tail"][:, 0].exp() if "tail" in labels else pair.teacher[:, -1].exp()
        kept = events.of_student(student, events.ids).exp().nan_to_num(0.0).masked_fill(~events.present, 0.0)
        student_tail = (1.0 - kept.sum(1)).clamp(min=0.0)
        if pair.ids is None:
            student_tail = torch.full_like(tail, torch.nan)
    of_label = entropy(pair.teacher) if pair.teacher_entropy is None else pair.teacher_entropy
    nothing = torch.full_like(own_target, torch.nan)
    target = nothing
    if shared is None:
        told = labels["target"][:, 0] if "target" in labels else pair.teacher_target
        target = events.target(target_ids) if told is None else told
    compared = pair if shared is None else _aligned_pair(logits, labels, head, known)
    columns = LabelRows(
        ids,
        teacher,
        theirs,
        control,
        torch.full_like(target_ids, -1) if pair.exhaustive else events.present.sum(1),
        tail,
        student_tail,
        of_label,
        student_entropy,
        target,
        own_target,
        nothing if compared is None else forward_kl(compared),
    )
    return _as_numpy(columns, reached=labels.get(ALIGNED))


@dataclass(frozen=True, eq=False, slots=True)
class _Events:
    """The ids of a label [n, E], or of all the vocabulary, with what the teacher gives them."""

    ids: torch.Tensor  # int64 [n, E]
    teacher: torch.Tensor  # float32 [n, E]
    present: torch.Tensor  # bool [n, E]
    shared: SharedIds | None

    @classmethod
    def of(cls, pair: PairedLogProbs, shared: SharedIds | None) -> _Events:
        teacher, ids = pair.teacher, pair.ids
        if not pair.exhaustive:
            teacher = teacher[:, :-1]
        if ids is None:
            of_all = torch.arange(teacher.shape[1], device=teacher.device).expand(teacher.shape)
            ids = of_all if pair.exhaustive else torch.full_like(of_all, -1)  # events that are no ids have no names
        return cls(ids, teacher, teacher > ABSENT / 2, shared)

    def likeliest(
        self, control: AbstractSequence[int], target_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids [n, MAX_IDS], their log-probabilities, which are control ids: the teacher's likeliest, and of the ids in
        the label always control ids and the target."""
        is_control = torch.isin(self.ids, torch.tensor(list(control), dtype=torch.int64, device=self.ids.device))
        always = is_control if target_ids is None else is_control | (self.ids == target_ids[:, None])
        scores = (self.teacher + _ALWAYS * always).masked_fill(~self.present, -torch.inf)
        places = scores.topk(min(MAX_IDS, scores.shape[1]), dim=1).indices
        teacher = self.teacher.gather(1, places).masked_fill(~self.present.gather(1, places), -torch.inf)
        teacher, order = teacher.sort(1, descending=True)
        places = places.gather(1, order)
        shown = always.gather(1, places) | (torch.arange(places.shape[1], device=places.device) < LIKELIEST)
        shown &= teacher.isfinite()
        more = (0, MAX_IDS - places.shape[1])
        ids = self.ids.gather(1, places).masked_fill(~shown, -1)
        control_ids = is_control.gather(1, places) & shown
        return functional.pad(ids, more, value=-1), functional.pad(teacher, more), functional.pad(control_ids, more)

    def of_student(self, student: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The student's log-probabilities [n, k] of ids of the teacher's; NaN for what it lacks."""
        own = ids if self.shared is None else torch.where(ids >= 0, self.shared.of_teacher[ids.clamp(min=0)], -1)
        return student.gather(1, own.clamp(min=0)).masked_fill(own < 0, torch.nan)

    def target(self, target_ids: torch.Tensor) -> torch.Tensor:
        """float32 [n]: NaN where the target is none of the ids."""
        at = (self.ids == target_ids[:, None]) & self.present
        return torch.where(at.any(1), self.teacher.masked_fill(~at, -torch.inf).amax(1), torch.nan)


def control_of(encoding: Encoding | Together) -> tuple[int, ...]:
    """Its control ids; none of an encoding that has no such thing."""
    found = getattr(encoding.encoding if isinstance(encoding, Together) else encoding, "control_ids", ())
    return tuple(one for one in found if isinstance(one, int))


def _aligned_pair(
    logits: torch.Tensor, labels: Mapping[str, torch.Tensor], head: Head | None, known: PartLabels
) -> PairedLogProbs | None:
    """What a divergence sees of a teacher with another tokenizer; None where its events mean no tokens."""
    if known.aligned is None:
        return None
    return known.aligned.align(logits, known.aligned.prepare(labels, head), head)


def _of_token(
    teacher: torch.Tensor, student: torch.Tensor, student_entropy: torch.Tensor, target_ids: torch.Tensor
) -> tuple[np.ndarray, ...]:
    """`token` labels say one number of a row."""
    nothing, ones = torch.full_like(teacher, torch.nan), torch.ones_like(target_ids)
    width = (0, MAX_IDS - 1)
    ids = functional.pad(target_ids[:, None], width, value=-1)
    both = (functional.pad(side[:, None], width) for side in (teacher, student))
    control = torch.zeros_like(ids, dtype=torch.bool)
    tails = (1.0 - teacher.exp(), 1.0 - student.exp())
    return _as_numpy(
        LabelRows(ids, *both, control, ones, *tails, nothing, student_entropy, teacher, student, nothing), reached=None
    )


def _as_numpy(columns: LabelRows, *, reached: torch.Tensor | None) -> tuple[np.ndarray, ...]:
    """In host memory; rows that no row of the teacher belongs to hold no ids."""
    found = {field.name: getattr(columns, field.name).cpu().numpy() for field in fields(columns)}
    if reached is not None:
        without = reached[:, 0].cpu().numpy() == 0
        found["ids"][without] = -1
        found["num_kept"][without] = 0
        for name in ("tail", "student_tail", "entropy", "kl", "target"):
            found[name] = np.where(without, np.nan, found[name]).astype(np.float32)
    return tuple(found.values())
