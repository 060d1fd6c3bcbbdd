"""Some ids of each row and one tail for all others: what encodings that keep ids have in common.

Both tails are sums over the ids that are not kept, never 1 - sum: in float16 or bfloat16 that difference is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.labels.encoding import ABSENT, Column, TeacherShape
from trainer.model.fast import softmax_and_log_sum_exp
from trainer.types import PairedLogProbs

_GAP = -1e30
"""The logit of an id that is left out, after division by the temperature: finite, so that a row whose rest is all -inf,
or empty, stays finite."""


def kept_and_tail(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Unnormalised log-probabilities [n, K + 1] of the kept ids and of everything else; differentiable by `logits`.

    An id may stand in a row again only where the gradient by its second event is zero.
    """
    return _KeptAndTail.apply(logits, ids, temperature)


def present_and_tail(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float, present: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kept_and_tail` where rows hold different numbers of ids, the first one always: `present` bool [n, K]. What a
    row lacks is an event of probability 0. Also the ids, with a row's first one in place of those it lacks."""
    ids = torch.where(present, ids, ids[:, :1])
    events = kept_and_tail(logits, ids, temperature)
    absent = torch.nn.functional.pad(~present, (0, 1))
    return torch.where(absent, events.detach().amax(1, keepdim=True) + ABSENT, events), ids


def rest_of(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax [n, V] over the ids that are *not* in `ids` (exactly 0 at those that are), and their log-sum-exp [n, 1].

    Of an empty rest the log-sum-exp is about `_GAP`, and the softmax means nothing.
    """
    rest = logits.scatter(1, ids, _GAP * temperature)
    if temperature != 1.0:
        rest.div_(temperature)
    return softmax_and_log_sum_exp(rest)


def id_dtype(vocabulary_size: int) -> torch.dtype:
    return torch.uint16 if vocabulary_size <= 2**16 else torch.int32


class _KeptAndTail(torch.autograd.Function):
    """Gather and masked log-sum-exp in one, because their separate backwards would fill [n, V] three times.

    Gradient by logits: g_tail softmax(rest) off the kept ids, g_k at them, both over the temperature.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
        rest, tail = rest_of(logits, ids, temperature)
        kept = logits.gather(1, ids).div_(temperature)
        empty = tail < _GAP / 2
        ctx.save_for_backward(rest, ids, empty)
        ctx.temperature = temperature
        return torch.cat([kept, torch.where(empty, kept.logsumexp(1, keepdim=True) + ABSENT, tail)], dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rest, ids, empty = ctx.saved_tensors
        grad = grad / ctx.temperature
        # In place: the buffer is this node's own, and autograd refuses a second backward through a changed one.
        rest.mul_(grad[:, -1:].masked_fill(empty, 0.0))
        return rest.scatter_add_(1, ids, grad[:, :-1]), None, None


def kept_layout(num_ids: int, shape: TeacherShape) -> tuple[Column, ...]:
    """Columns of labels with as many ids in every row: `tail`, `target`, `ids`, `logprobs`, wider dtypes first."""
    wide = (Column("tail", torch.float32, 1), Column("target", torch.float32, 1))
    ids = Column("ids", id_dtype(shape.vocabulary_size), num_ids)
    logprobs = Column("logprobs", torch.float16, num_ids)
    return (*wide, *sorted((ids, logprobs), key=lambda column: -column.dtype.itemsize))


def kept_pair(
    events: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, labels: Mapping[str, torch.Tensor]
) -> PairedLogProbs:
    """Of unnormalised log-probabilities [n, K + 1] of both sides, the tail last, and the kept ids int64 [n, K]."""
    return PairedLogProbs(
        events.log_softmax(1),
        teacher.log_softmax(1),
        exhaustive=False,
        student_scores=events,
        ids=ids,
        teacher_target=labels["target"][:, 0] if "target" in labels else None,
    )
