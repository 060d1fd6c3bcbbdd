"""lm_head and the objective in one: loss and gradients from hidden states, without the [rows, vocabulary] tensor.

    a part with sequence terms:   hidden @ weight.T -> log q(target) of each row -> d loss / d log q     (no gradient)
    for a chunk of its rows:      hidden @ weight.T -> products [chunk, V]       (and the teacher's, for hidden labels)
      for a block of it:            head shape -> objective -> gradient, written over the products    (all in cache)
                                  grad_hidden = products @ weight,  grad_weight += products.T @ hidden

A file of its own because it is the one place where gradients are computed in the forward pass: nothing of size V has to
live until backward, and the weight is not needed there, which is what ZeRO-3's gather hooks allow inside lm_head's
forward. It knows neither encodings nor divergences, only `Objective`.

A sequence term is a function of the answers' log-probabilities, sums over rows. Its gradient by a row's log q(target)
is that by the sum of the row's answer, so that in the second pass such a row is one of weighted -log q(target), and
chunking, ZeRO-3 and packing hold as for every other row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from trainer.labels.encoding import Encoding
from trainer.labels.token import LOGPROB
from trainer.losses.compiled import CompiledRows
from trainer.losses.ensemble import Together, target_logprobs
from trainer.losses.head_gradients import HeadGradients
from trainer.losses.objective import Objective
from trainer.losses.terms import SequenceScores
from trainer.model.fast import cache_blocks, known_to_be_one
from trainer.model.head import Head, HeadShape


@dataclass(frozen=True, slots=True)
class LossPart:
    """Rows of one call that share objective and labels, such as those of one task."""

    rows: slice  # of the call's N rows; n = its length
    labels: Mapping[str, torch.Tensor]  # columns of `encoding`, each [n, width]
    encoding: Encoding | Together | None
    objective: Objective
    scale: float  # of row terms, for example ranks over the step's loss tokens
    teacher_head: Head | None = None
    row_weights: torch.Tensor | None = None  # float32 [n] of row terms; None: all 1
    positions: torch.Tensor | None = None  # int64 [n], rows before each in its sequence; for weights of tokens by it
    group_scale: float = 0.0  # of sequence terms, for example ranks over the step's groups
    row_sequences: torch.Tensor | None = None  # int64 [n], positions in S; for sequence terms, as all below
    groups: tuple[tuple[int, ...], ...] = ()  # see `SequenceScores`
    rewards: tuple[float | None, ...] = ()  # [S]
    compiled: CompiledRows | None = None  # the objective's `rows`, where they are compiled
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)  # float32 [n] each, of text the student wrote


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """`loss` float32 [], all parts with their scales, with gradients; `sums` float64 [] by part and name: each bare
    row term summed over its rows with their weights, each bare sequence term summed over its groups."""

    loss: torch.Tensor
    sums: tuple[Mapping[str, torch.Tensor], ...]


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target_ids: torch.Tensor,
    *,
    head_shape: HeadShape,
    vocabulary_size: int,
    parts: AbstractSequence[LossPart],
    chunk_rows: int = 512,
) -> HeadLoss:
    """The sum over all parts of their objectives, with one gradient of the head.

    hidden [N, H], weight [>= V, H], bias [>= V] or None: the student's; rows of weight beyond `vocabulary_size` are
    padding: they enter only the objective's term for them, and where it has none they get gradient exactly zero.
    target_ids int64 [N].

    Gradients flow to whichever of the three asks for one; a frozen weight gets no buffer. The parts' scales multiply
    before gradients are rounded to the weight's dtype. N = 0 gives a loss of 0 whose backward works. Memory beyond
    weight and its gradient: [chunk_rows, V], once more for hidden labels; on a device that is no CPU a few times that.
    The gradients are first-order only.
    """
    assert sum(part.rows.stop - part.rows.start for part in parts) == len(target_ids), "every row is in one part"
    work = _Work(head_shape, vocabulary_size, target_ids, tuple(parts), chunk_rows)
    parameters = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
        loss, sums = _GradientsInForward.apply(*parameters, work)
    else:
        loss, sums = work.values(HeadGradients.of(parameters, wanted=(False, False, False)))
    values = iter(sums.unbind())
    return HeadLoss(loss, tuple({name: next(values) for name in part.objective.names} for part in parts))


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: _Work
    ) -> tuple[torch.Tensor, torch.Tensor]:
        accumulator = HeadGradients.of((hidden, weight, bias), wanted=ctx.needs_input_grad[:3])
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
        if not known_to_be_one(grad_loss):
            gradients = tuple(None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in gradients)
        return *gradients, None


@dataclass(frozen=True, slots=True)
class _Work:
    """Everything but the tensors that carry gradients."""

    head_shape: HeadShape
    vocabulary_size: int
    target_ids: torch.Tensor
    parts: tuple[LossPart, ...]
    chunk_rows: int

    def values(self, accumulator: HeadGradients) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss float32 [], sums float64 [names of all parts]); gradients go into the accumulator."""
        loss = torch.zeros((), dtype=torch.float64, device=accumulator.hidden.device)
        sums = [torch.empty(0, dtype=torch.float64, device=loss.device)]
        for part in self.parts:
            sequences = None
            if part.objective.sequence_terms or part.objective.looks_ahead:
                logprobs = self._logprobs(part, accumulator)
                sequences = self._sequences(part, logprobs) if part.objective.sequence_terms else None
                part = self._with_futures(part, logprobs)
            totals = torch.zeros(1 + len(part.objective.row_names), dtype=torch.float64, device=loss.device)
            for chunk in self._chunks(part):
                row_weights = None if sequences is None else sequences.row_weights
                totals += self._chunk(part, chunk, row_weights, accumulator)
            loss = loss + totals[0] * part.scale
            sums.append(totals[1:])
            if sequences is not None:
                loss = loss + sequences.loss
                sums.append(sequences.sums)
        return loss.float(), torch.cat(sums)

    def _chunks(self, part: LossPart) -> list[slice]:
        """Slices of the call's rows."""
        starts = range(part.rows.start, part.rows.stop, self.chunk_rows)
        return [slice(start, min(start + self.chunk_rows, part.rows.stop)) for start in starts]

    def _logprobs(self, part: LossPart, accumulator: HeadGradients) -> torch.Tensor:
        """The first pass: float32 [n], log q of the part's target ids."""
        logprobs = torch.empty(part.rows.stop - part.rows.start, dtype=torch.float32, device=self.target_ids.device)
        for chunk in self._chunks(part):
            ids, start = self.target_ids[chunk], chunk.start - part.rows.start
            products = accumulator.product(chunk, slice(0, self.vocabulary_size))
            for block in cache_blocks(products[: ids.shape[0]]):
                logits = self.head_shape.apply(products[block].float())
                nats = functional.cross_entropy(logits, ids[block], reduction="none")
                logprobs[start + block.start : start + block.stop] = -nats
        return logprobs

    def _with_futures(self, part: LossPart, logprobs: torch.Tensor) -> LossPart:
        """The part with what rows after a row say, where a term looks ahead."""
        if not part.objective.looks_ahead:
            return part
        teacher = target_logprobs(
            part.encoding,
            part.labels,
            self.target_ids[part.rows],
            part.teacher_head,
            vocabulary_size=self.vocabulary_size,
            chunk_rows=self.chunk_rows,
        )
        futures = part.objective.futures(logprobs, teacher, part.row_sequences)
        return replace(part, columns={**part.columns, **futures})

    def _sequences(self, part: LossPart, logprobs: torch.Tensor) -> _SequenceLoss:
        """What the part's sequence terms make of its answers."""
        summed = [logprobs.double()]
        if part.objective.needs_reference:
            summed.append(part.labels[LOGPROB][:, 0].double())
        num_sequences = len(part.rewards)
        student, *reference = (rows.new_zeros(num_sequences).index_add_(0, part.row_sequences, rows) for rows in summed)
        scores = SequenceScores(
            student=student,
            reference=reference[0] if reference else None,
            num_rows=part.row_sequences.bincount(minlength=num_sequences),
            rewards=part.rewards,
            groups=part.groups,
        )
        loss, gradient, values = part.objective.sequences(scores)
        row_weights = (-part.group_scale * gradient)[part.row_sequences].float()
        return _SequenceLoss(loss * part.group_scale, torch.stack(values), row_weights)

    def _chunk(
        self, part: LossPart, chunk: slice, nll_weights: torch.Tensor | None, accumulator: HeadGradients
    ) -> torch.Tensor:
        own = slice(chunk.start - part.rows.start, chunk.stop - part.rows.start)
        objective = part.objective
        labels = {name: column[own] for name, column in part.labels.items()}
        if objective.needs_labels:
            labels = part.encoding.prepare(labels, part.teacher_head)
        target_ids = self.target_ids[chunk]
        products = [accumulator.product(chunk, slice(0, self.vocabulary_size))]
        if accumulator.weight.shape[0] > self.vocabulary_size and objective.padding_weight:
            products.append(accumulator.product(chunk, slice(self.vocabulary_size, None)))
        totals = torch.zeros(1 + len(objective.row_names), dtype=torch.float64, device=products[0].device)
        for block in cache_blocks(products[0][: target_ids.shape[0]]):
            rows = _Block(
                products=[product[block] for product in products],
                labels={name: column[block] for name, column in labels.items()},
                target_ids=target_ids[block],
                row_weights=None if part.row_weights is None else part.row_weights[own][block],
                nll_weights=None if nll_weights is None else nll_weights[own][block],
                positions=None if part.positions is None else part.positions[own][block],
                columns={name: column[own][block] for name, column in part.columns.items()},
            )
            totals += self._block(part, rows, differentiate=accumulator.wants_any)
        if accumulator.wants_any:
            accumulator.add(chunk, products)
        return totals

    def _block(self, part: LossPart, rows: _Block, *, differentiate: bool) -> torch.Tensor:
        """As `_computed`, by the compiled rows of the objective as long as they compile."""
        if part.compiled is not None and part.compiled.works:
            try:
                return self._computed(part, part.compiled, rows, differentiate=differentiate)
            except RuntimeError as error:
                if not part.compiled.gives_up(error):
                    raise
        return self._computed(part, part.objective.rows, rows, differentiate=differentiate)

    def _computed(
        self, part: LossPart, rows_of: Callable[..., Any], rows: _Block, *, differentiate: bool
    ) -> torch.Tensor:
        """Sums of loss and row terms; with `differentiate`, the block's products ([n, V], and [n, P] of the padding if
        it counts) become the gradients by them, scales and weights included."""
        with torch.set_grad_enabled(differentiate), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            leaves = [product.detach().requires_grad_(differentiate) for product in rows.products]
            logits, *padding = (self.head_shape.apply(leaf.float()) for leaf in leaves)
            loss, terms = rows_of(
                logits,
                rows.labels,
                rows.target_ids,
                part.encoding,
                part.teacher_head,
                *padding,
                positions=rows.positions,
                **({"columns": rows.columns} if rows.columns else {}),
            )
            outputs, weights = [], []
            if loss is not None:
                outputs.append(loss)
                scale = torch.full_like(loss, part.scale)
                weights.append(scale if rows.row_weights is None else scale * rows.row_weights)
            if rows.nll_weights is not None:
                outputs.append(functional.cross_entropy(logits, rows.target_ids, reduction="none"))
                weights.append(rows.nll_weights)
            if differentiate:  # an objective of features alone has nothing to say of logits
                given = torch.autograd.grad(outputs, leaves, weights, allow_unused=True) if outputs else ()
                gradients = given or (None,) * len(leaves)
        if differentiate:
            for product, gradient in zip(rows.products, gradients, strict=True):
                product.copy_(gradient) if gradient is not None else product.zero_()
        values = [rows.target_ids.new_zeros(1) if loss is None else loss.detach(), *terms.values()]
        if rows.row_weights is not None:
            values = [value * rows.row_weights for value in values]
        return torch.stack([value.double().sum() for value in values])


@dataclass(frozen=True, slots=True)
class _SequenceLoss:
    """What the sequence terms of a part give."""

    loss: torch.Tensor  # float64 [], scaled
    sums: torch.Tensor  # float64 [terms], bare
    row_weights: torch.Tensor  # float32 [n]: d loss / d (-log q(target)) of each row, scaled


@dataclass(frozen=True, slots=True)
class _Block:
    """A few rows of a part."""

    products: list[torch.Tensor]
    labels: Mapping[str, torch.Tensor]
    target_ids: torch.Tensor
    row_weights: torch.Tensor | None
    nll_weights: torch.Tensor | None
    positions: torch.Tensor | None
    columns: Mapping[str, torch.Tensor]


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    """As saved-tensor hooks: shields the inner graph from those of an activation checkpoint around the head."""
    return tensor
