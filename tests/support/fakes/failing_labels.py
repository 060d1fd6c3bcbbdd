"""Top-k labels that work until a file appears; then the student raises, as a bug in the middle of a run would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import Labels
from trainer.labels import topk
from trainer.labels.encoding import Column, TeacherShape
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head


class Encoding(Labels):
    trigger: str
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
        if Path(self.trigger).exists():
            raise RuntimeError("a bug in the middle of the run")
        return self._plain().align(logits, labels, teacher_head)

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return self._plain().mass(columns)
