"""An encoding that looks right from outside and fails in the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from configs.labels import Labels
from trainer.labels.encoding import Column, TeacherShape
from trainer.model.head import Head
from trainer.types import PairedLogProbs


class Encoding(Labels):
    needs: ClassVar[str] = "logits"

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        return (Column("nothing", torch.float32, 1),)

    def encode(self, source: torch.Tensor, target_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        raise RuntimeError("this encoding is broken")

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        return labels

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None
    ) -> PairedLogProbs:
        raise RuntimeError("this encoding is broken")

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return 1.0
