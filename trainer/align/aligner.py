"""What a method of `align` must offer, and the ids that two vocabularies share as tensors of a device.

reader of rows     groups: which rows of both sides belong together     -> Reading, which travels with a sequence
student's rank     encoding: what the labels of such rows are           -> PairedLogProbs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import numpy as np
import torch

from trainer.align.rows import Chunks, Span
from trainer.labels.encoding import ABSENT, Encoding
from trainer.types import PairedLogProbs


class Aligner(Protocol):
    """The contract of the class `Aligner` in each file, which derives from the method's parameters in
    `configs/alignment.py`."""

    min_ratio: float

    def groups(self, student: tuple[Span, ...], teacher: tuple[Span, ...]) -> Chunks:
        """Which loss rows of both sides belong together. As many spans on each side."""
        ...

    def encoding(self, encoding: Encoding, shared: SharedIds) -> Encoding:
        """What stands on the student's side in place of the encoding of the labels."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class SharedIds:
    """Which ids of both vocabularies are one token, on a device."""

    of_teacher: torch.Tensor  # int64 [V of the teacher]: the student's id, or -1
    teacher_ids: torch.Tensor  # int64 [S] shared ones
    student_ids: torch.Tensor  # int64 [S] the same tokens
    num_student: int  # V of the student
    exhaustive: bool  # whether neither side has another id

    @classmethod
    def of(cls, table: np.ndarray, *, num_student: int, device: torch.device) -> SharedIds:
        """`table` int32 [V of the teacher], as `match_ids` makes it."""
        of_teacher = torch.from_numpy(table.astype(np.int64)).to(device)
        teacher_ids = (of_teacher >= 0).nonzero()[:, 0]
        exhaustive = len(teacher_ids) == len(table) == num_student
        return cls(of_teacher, teacher_ids, of_teacher[teacher_ids], num_student, exhaustive)

    @classmethod
    def common(
        cls, tables: Mapping[str, np.ndarray], *, num_student: int, device: torch.device
    ) -> dict[str, SharedIds]:
        """Of several teachers, by name: the ids that all of them have, in the student's order, so that their pairs are
        over the same events."""
        ids = reduce(np.intersect1d, [table[table >= 0] for table in tables.values()])
        made = {}
        for name, table in tables.items():
            one = cls.of(np.where(np.isin(table, ids), table, -1), num_student=num_student, device=device)
            order = one.student_ids.argsort()
            made[name] = replace(one, teacher_ids=one.teacher_ids[order], student_ids=one.student_ids[order])
        exhaustive = all(one.exhaustive for one in made.values())
        return {name: replace(one, exhaustive=exhaustive) for name, one in made.items()}

    @property
    def num_teacher(self) -> int:
        return len(self.of_teacher)

    def pair(self, student: torch.Tensor, teacher: torch.Tensor) -> PairedLogProbs:
        """Log-probabilities [n, V] of each vocabulary as a pair over the shared ids, in the order of the teacher's, and
        one event of the others, where there are any."""
        sides = []
        for logprobs, ids in ((student, self.student_ids), (teacher, self.teacher_ids)):
            kept = logprobs[:, ids]
            if not self.exhaustive:
                kept = torch.cat([kept, _rest(logprobs, ids)], dim=1)
            sides.append(kept)
        return PairedLogProbs(*sides, exhaustive=self.exhaustive)


def _rest(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log of the mass [n, 1] of all other ids, a sum over them and never one minus the sum of these."""
    others = torch.ones(logprobs.shape[1], dtype=torch.bool, device=logprobs.device)
    others[ids] = False
    if not others.any():
        return logprobs.new_full((logprobs.shape[0], 1), ABSENT)
    return logprobs[:, others].logsumexp(1, keepdim=True).clamp(min=ABSENT)
