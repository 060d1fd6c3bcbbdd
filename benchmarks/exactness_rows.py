"""Rows of both models that exactness is measured on, and what becomes of values and gradients over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainer.model.head import Head

BLOCK_ROWS = 32

Gradient = tuple[float, torch.Tensor]
"""Value and gradient by the student's logits [n, V], both summed over rows."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of both models at which an answer's next token is known."""

    hidden: torch.Tensor  # float32 [N, H], the teacher's
    head: Head
    student: torch.Tensor  # float32 [N, V] logits
    target_ids: torch.Tensor  # int64 [N]

    def blocks(self) -> Iterator[Rows]:
        for start in range(0, len(self.target_ids), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            yield Rows(self.hidden[part], self.head, self.student[part], self.target_ids[part])


class Totals:
    """Of one cell, over blocks."""

    def __init__(self) -> None:
        self.exact = self.value = self.exact_square = self.bias_square = self.spread_square = self.value_square = 0.0
        self.draws = 1

    def add(self, exact: Gradient, found: list[Gradient]) -> None:
        self.draws = len(found)
        values = torch.tensor([value for value, _ in found], dtype=torch.float64)
        mean = sum(gradient.double() for _, gradient in found) / len(found)
        self.exact += exact[0]
        self.value += float(values.mean())
        self.exact_square += float(exact[1].square().sum())
        self.bias_square += float((mean - exact[1]).square().sum())
        if len(found) > 1:
            self.spread_square += sum(float((g.double() - mean).square().sum()) for _, g in found) / (len(found) - 1)
            self.value_square += float(values.var()) / len(found)

    def numbers(self) -> dict[str, float]:
        norm = self.exact_square**0.5
        made = {
            "exact": self.exact,
            "value_bias": self.value / self.exact - 1.0,
            "gradient_bias": self.bias_square**0.5 / norm,
        }
        if self.draws > 1:  # what of the distance is the error of a mean of so many draws
            made["value_error"] = self.value_square**0.5 / self.exact
            made["gradient_error"] = (self.spread_square / self.draws) ** 0.5 / norm
            made["gradient_spread"] = self.spread_square**0.5 / norm
        return made
