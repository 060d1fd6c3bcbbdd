"""lm_head and the objective in one: loss and gradients from hidden states, without the [rows, vocabulary] tensor.

    for a chunk of rows:    hidden @ weight.T  ->  products [chunk, V]          (and the teacher's, if its labels need
    it)
      for a block of it:      head shape -> objective -> gradient, written over the products   (all passes in cache)
                            grad_hidden = products @ weight,  grad_weight += products.T @ hidden

A file of its own because it is the one place where gradients are computed in the forward pass: nothing of size V has to
live until backward, and the weight is not needed there, which is what ZeRO-3's gather hooks allow inside lm_head's
forward. It knows neither encodings nor divergences, only `Objective.rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.labels.encoding import Encoding
from trainer.losses.objective import Objective
from trainer.model.fast.matmul import cache_blocks, matmul_nt, whole_rows
from trainer.model.head import Head, HeadShape


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """`loss` float32 [], times `scale`, with gradients; `sums` float64 [], each bare term summed over the rows."""

    loss: torch.Tensor
    sums: Mapping[str, torch.Tensor]


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    head_shape: HeadShape,
    vocabulary_size: int,
    labels: Mapping[str, torch.Tensor],
    next_ids: torch.Tensor,
    encoding: Encoding,
    objective: Objective,
    teacher_head: Head | None = None,
    chunk_rows: int = 512,
    scale: float,
) -> HeadLoss:
    """`scale` * sum over rows of the objective.

    hidden [N, H], weight [>= V, H], bias [>= V] or None: the student's; rows of weight beyond `vocabulary_size` are
    padding: they enter only the objective's term for them, and where it has none they get gradient exactly zero.
    labels: columns of `encoding`, each [N, width]; next_ids int64 [N].

    Gradients flow to whichever of the three asks for one; a frozen weight gets no buffer. `scale` (for example ranks
    over the step's loss tokens) multiplies before gradients are rounded to the weight's dtype. N = 0 gives a loss of 0
    whose backward works. Memory beyond weight and its gradient: [chunk_rows, V], once more for hidden labels; on a
    device that is no CPU a few times that. The gradients are first-order only.
    """
    work = _Work(head_shape, vocabulary_size, labels, next_ids, encoding, objective, teacher_head, chunk_rows, scale)
    parameters = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
        loss, sums = _GradientsInForward.apply(*parameters, work)
    else:
        loss, sums = work.values(_Accumulator.of(parameters, wanted=(False, False, False)))
    return HeadLoss(loss, dict(zip(objective.names, sums.unbind(), strict=True)))


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: _Work
    ) -> tuple[torch.Tensor, torch.Tensor]:
        accumulator = _Accumulator.of((hidden, weight, bias), wanted=ctx.needs_input_grad[:3])
        loss, sums = work.values(accumulator)
        # Attributes and not save_for_backward: activation checkpointing would throw them away and compute them twice.
        ctx.gradients = accumulator.finish()
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return loss, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("head_loss: backward a second time; its gradients are handed out once, to save memory")
        if grad_loss is None:
            return None, None, None, None
        if not (grad_loss.is_cpu and grad_loss.item() == 1.0):  # elsewhere reading it would wait for the device
            gradients = tuple(None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in gradients)
        return *gradients, None


@dataclass(frozen=True, slots=True)
class _Work:
    """Everything but the tensors that carry gradients."""

    head_shape: HeadShape
    vocabulary_size: int
    labels: Mapping[str, torch.Tensor]
    next_ids: torch.Tensor
    encoding: Encoding
    objective: Objective
    teacher_head: Head | None
    chunk_rows: int
    scale: float

    def values(self, accumulator: _Accumulator) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss float32 [], sums float64 [terms]) over all rows; gradients go into the accumulator."""
        hidden = accumulator.hidden
        totals = torch.zeros(1 + len(self.objective.names), dtype=torch.float64, device=hidden.device)
        for start in range(0, hidden.shape[0], self.chunk_rows):
            totals += self._chunk(slice(start, min(start + self.chunk_rows, hidden.shape[0])), accumulator)
        return (totals[0] * self.scale).float(), totals[1:]

    def _chunk(self, chunk: slice, accumulator: _Accumulator) -> torch.Tensor:
        labels = {name: column[chunk] for name, column in self.labels.items()}
        if self.objective.needs_labels:
            labels = self.encoding.ready(labels, self.teacher_head)
        next_ids = self.next_ids[chunk]
        parts = [accumulator.product(chunk, slice(0, self.vocabulary_size))]
        if accumulator.weight.shape[0] > self.vocabulary_size and self.objective.padding_weight:
            parts.append(accumulator.product(chunk, slice(self.vocabulary_size, None)))
        totals = torch.zeros(1 + len(self.objective.names), dtype=torch.float64, device=parts[0].device)
        for block in cache_blocks(parts[0][: next_ids.shape[0]]):
            block_labels = {name: column[block] for name, column in labels.items()}
            products = [part[block] for part in parts]
            totals += self._block(products, block_labels, next_ids[block], differentiate=accumulator.wants_any)
        if accumulator.wants_any:
            accumulator.add(chunk, parts)
        return totals

    def _block(
        self,
        products: list[torch.Tensor],
        labels: Mapping[str, torch.Tensor],
        next_ids: torch.Tensor,
        *,
        differentiate: bool,
    ) -> torch.Tensor:
        """Sums of loss and terms; with `differentiate`, `products` ([n, V], and [n, P] of the padding if it counts)
        become the gradients by them, times `scale`."""
        with torch.set_grad_enabled(differentiate), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            leaves = [part.detach().requires_grad_(differentiate) for part in products]
            logits, *padding = (self.head_shape.apply(leaf.float()) for leaf in leaves)
            loss, terms = self.objective.rows(logits, labels, next_ids, self.encoding, self.teacher_head, *padding)
            if differentiate:
                gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, self.scale))
        if differentiate:
            for part, gradient in zip(products, gradients, strict=True):
                part.copy_(gradient)
        return torch.stack([loss.detach().double().sum(), *(rows.double().sum() for rows in terms.values())])


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    """As saved-tensor hooks: shields the inner graph from those of an activation checkpoint around the head."""
    return tensor


@dataclass(slots=True)
class _Accumulator:
    """The student's head and the gradients of one call while they grow: of the vocabulary, then of the padding if that
    counts."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    wanted: tuple[bool, bool, bool]
    grad_hidden: torch.Tensor | None
    grad_weight: list[torch.Tensor] = field(default_factory=list)
    grad_bias: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        *,
        wanted: tuple[bool, bool, bool],
    ) -> _Accumulator:
        hidden, weight, bias = (None if p is None else p.detach() for p in parameters)
        return cls(hidden, weight, bias, wanted, torch.empty_like(hidden) if wanted[0] else None)

    @property
    def wants_any(self) -> bool:
        return any(self.wanted)

    def product(self, chunk: slice, rows: slice) -> torch.Tensor:
        """`hidden @ weight.T + bias` of the chunk and these rows of the head; a few rows more than the chunk has, see
        `whole_rows`."""
        weight, bias = self.weight[rows], None if self.bias is None else self.bias[rows]
        return Head(weight, bias, HeadShape(), weight.shape[0]).product(whole_rows(self.hidden[chunk]))

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
                _add_to(self.grad_weight, part, matmul_nt(gradient.t(), whole_rows(hidden).t()))
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
