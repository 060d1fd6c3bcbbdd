"""The gradients of a head and of what it reads, while the chunks of one call are worked off (`fused.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from trainer.model.fast import add_matmul_nt, matmul_nt, whole_rows
from trainer.model.head import Head, HeadShape


@dataclass(slots=True)
class HeadGradients:
    """The student's head and the gradients of one call while they grow: of the vocabulary, then of the padding if that
    counts."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    wanted: tuple[bool, bool, bool]
    grad_hidden: torch.Tensor | None
    grad_weight: list[torch.Tensor] = field(default_factory=list)
    grad_bias: list[torch.Tensor] = field(default_factory=list)
    _products: torch.Tensor | None = None  # of one chunk over the vocabulary; the next one is written over it

    @classmethod
    def of(
        cls,
        parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        *,
        wanted: tuple[bool, bool, bool],
    ) -> HeadGradients:
        hidden, weight, bias = (None if p is None else p.detach() for p in parameters)
        return cls(hidden, weight, bias, wanted, torch.empty_like(hidden) if wanted[0] else None)

    @property
    def wants_any(self) -> bool:
        return any(self.wanted)

    def product(self, chunk: slice, rows: slice) -> torch.Tensor:
        """`hidden @ weight.T + bias` of the chunk and these rows of the head; a few rows more than the chunk has, see
        `whole_rows`. Those of the vocabulary stay until they are asked for again."""
        weight, bias = self.weight[rows], None if self.bias is None else self.bias[rows]
        hidden, out = whole_rows(self.hidden[chunk]), None
        if rows.start == 0:
            if self._products is None or self._products.shape[0] < hidden.shape[0]:
                self._products = weight.new_empty(hidden.shape[0], weight.shape[0])
            out = self._products
        return Head(weight, bias, HeadShape(), weight.shape[0]).product(hidden, out)

    def add(self, chunk: slice, gradients: list[torch.Tensor]) -> None:
        """The chunk's gradients by its products, in the dtype of the weight and the order of the head's rows; sums over
        rows grow in float32."""
        hidden = self.hidden[chunk].to(gradients[0].dtype)
        n, start = hidden.shape[0], 0
        for part, gradient in enumerate(gradients):
            rows = slice(start, start + gradient.shape[1])
            start = rows.stop
            gradient[n:] = 0.0
            if self.wanted[0]:
                by_hidden = matmul_nt(gradient, self.weight[rows].t())[:n]
                self.grad_hidden[chunk] = by_hidden if part == 0 else self.grad_hidden[chunk] + by_hidden
            if self.wanted[1]:
                rows_of_hidden = whole_rows(hidden)[: gradient.shape[0]]
                if fresh := part == len(self.grad_weight):
                    shape = gradient.shape[1], hidden.shape[1]
                    self.grad_weight.append(gradient.new_empty(shape, dtype=torch.float32))
                add_matmul_nt(self.grad_weight[part], gradient.t(), rows_of_hidden.t(), fresh=fresh)
            if self.wanted[2]:
                _add_to(self.grad_bias, part, gradient.sum(0, dtype=torch.float32))

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients in the shapes and dtypes of the parameters; zero where nothing was added."""
        grad_weight = _joined(self.grad_weight, self.weight) if self.wanted[1] else None
        grad_bias = _joined(self.grad_bias, self.bias) if self.wanted[2] else None
        return self.grad_hidden, grad_weight, grad_bias


def _add_to(totals: list[torch.Tensor], part: int, more: torch.Tensor) -> None:
    if part < len(totals):
        totals[part].add_(more)
    else:
        totals.append(more.float())


def _joined(totals: list[torch.Tensor], parameter: torch.Tensor) -> torch.Tensor:
    if len(totals) == 1 and totals[0].shape == parameter.shape:
        return totals[0].to(parameter.dtype)
    full, start = torch.zeros_like(parameter), 0
    for total in totals:
        full[start : start + total.shape[0]] = total
        start += total.shape[0]
    return full
