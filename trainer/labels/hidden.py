"""Hidden labels: the teacher's final hidden state of each row. Exact for every divergence, at 2 H or 4 H bytes a row,
and as much again for each further layer that terms on features need.

They cost the teacher nothing beyond its prefill; the student's side multiplies by the teacher's head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from configs.labels import Hidden
from trainer.labels.encoding import Column, TeacherShape
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head

_PRODUCT = "product"
STATES = "states"


class Encoding(Hidden):
    """Column `hidden` [N, H], after the teacher's final norm, and with `layers` column `states` [N, K H], those after
    these layers side by side. `dtype: auto` is the dtype the teacher computes in, which loses nothing."""

    needs: ClassVar[Literal["logits", "hidden"]] = "hidden"

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        dtype, width = self._dtype(shape.dtype), shape.hidden_size
        states = (Column(STATES, dtype, width * len(self.layers)),) if self.layers else ()
        return (Column("hidden", dtype, width), *states)

    def encode(
        self, source: torch.Tensor, target_ids: torch.Tensor, states: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """From final hidden states [n, H] and, with `layers`, `states` [n, K, H]; without logits the target id has no
        log-probability here."""
        dtype = self._dtype(source.dtype)
        columns = {"hidden": source.detach().to(dtype)}
        if self.layers:
            assert states is not None, f"nobody gave the states after layers {self.layers}"
            columns[STATES] = states.detach().to(dtype).flatten(1)
        return columns

    def states_of(self, labels: Mapping[str, torch.Tensor], layer: int) -> torch.Tensor:
        """[n, H] after a layer that is one of `layers`."""
        return labels[STATES].unflatten(1, (len(self.layers), -1))[:, self.layers.index(layer)]

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        """The teacher's products [n, V] in the dtype of its head; `align` scales and soft-caps them."""
        return {_PRODUCT: _given(teacher_head).product(labels["hidden"])}

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None
    ) -> PairedLogProbs:
        """[n, V], exhaustive; the teacher's logits are exactly those of its own head in its own dtype."""
        head = _given(teacher_head)
        product = labels[_PRODUCT] if _PRODUCT in labels else head.product(labels["hidden"])
        teacher = head.shape.apply(product.to(logits.dtype))
        if self.temperature != 1.0:
            teacher, logits = teacher / self.temperature, logits / self.temperature
        return PairedLogProbs(logits.log_softmax(1), teacher.log_softmax(1), exhaustive=True, student_scores=logits)

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        return 1.0

    def _dtype(self, teachers: torch.dtype) -> torch.dtype:
        return teachers if self.dtype == "auto" else getattr(torch, self.dtype)


def _given(head: Head | None) -> Head:
    if head is None:
        raise ValueError("hidden labels need the teacher's head (teacher_head), got None")
    return head
