"""Top-k labels with two poisons, for tests of steps that must be skipped: a row whose kept mass is marked gives a loss
that is NaN, or one that is infinite while its gradient stays finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import Labels
from trainer.labels import topk
from trainer.labels.encoding import Column, TeacherShape
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head

MARKS = {7.0: torch.nan, 8.0: -torch.inf}
"""Values of the column `target`, which training does not read, and what they add to the student's log-probability."""


class Encoding(Labels):
    k: int = 8

    needs: ClassVar[Literal["logits", "hidden"]] = "logits"

    def _plain(self) -> topk.Encoding:
        return topk.Encoding(k=self.k, temperature=self.temperature)

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        return self._plain().layout(shape)

    def encode(self, source: torch.Tensor, target_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._plain().encode(source, target_ids)

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        return labels

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None
    ) -> PairedLogProbs:
        pair = self._plain().align(logits, labels, teacher_head)
        student = pair.student
        for mark, value in MARKS.items():
            marked = labels["target"] == mark
            if marked.any():  # else the other side of `where` would leak NaN into every gradient
                student = torch.where(marked, student * value if math.isnan(value) else student + value, student)
        return replace(pair, student=student)

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return self._plain().mass(columns)
