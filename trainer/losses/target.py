"""Divergences that tell the target id from all others (kl.py says what all divergences share)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from configs.losses import Atkd, Dkd
from trainer.labels.encoding import ABSENT
from trainer.losses.terms import computes
from trainer.losses.with_gradient import with_gradient
from trainer.types import PairedLogProbs


@dataclass(frozen=True, slots=True)
class TargetEvent:
    """Where the target id of each row is among the events of a pair."""

    event: torch.Tensor  # int64 [N], the event that it is or lies in
    alone: torch.Tensor  # bool [N], whether it is that event; else it is one id of the lumped tail
    student: torch.Tensor  # float32 [N] log q(target); carries the gradient where the event does not
    teacher: torch.Tensor  # float32 [N] log p(target)

    @classmethod
    def of(
        cls, pair: PairedLogProbs, logits: torch.Tensor, target_ids: torch.Tensor, *, temperature: float
    ) -> TargetEvent:
        """From a pair whose encoding `gives` target events, and the student's logits [N, V] of the same rows."""
        if pair.exhaustive:
            event, alone = target_ids[:, None], torch.ones_like(target_ids, dtype=torch.bool)
            student, teacher = pair.student.detach().gather(1, event), pair.teacher.gather(1, event)
            return cls(event[:, 0], alone, student[:, 0], teacher[:, 0].clamp(min=ABSENT))
        assert pair.ids is not None, "these labels give no target events"
        assert pair.teacher_target is not None, "these labels give no log-probability of the target"
        found = pair.ids == target_ids[:, None]
        alone = found.any(1)
        event = torch.where(alone, found.to(torch.uint8).argmax(1), pair.ids.shape[1])
        # The tail is a sum; the target's own part of it follows from any kept id, whose log-probability is known.
        scores = logits.gather(1, torch.cat([target_ids[:, None], pair.ids[:, :1]], dim=1)) / temperature
        student = pair.student[:, 0] + scores[:, 0] - scores[:, 1]
        teacher = torch.where(alone, pair.teacher.gather(1, event[:, None])[:, 0], pair.teacher_target)
        return cls(event, alone, student, teacher.clamp(min=ABSENT))


@computes(Dkd)
def dkd(
    pair: PairedLogProbs, target: TargetEvent, *, alpha: float | torch.Tensor, beta: float | torch.Tensor
) -> torch.Tensor:
    """alpha TCKD + beta NCKD, [N]: KL of the two events {target, others}, and KL among the others, renormalised there.
    Gradient at the target alpha (q - p); at another id, with r and s its probabilities among the others under student
    and teacher, alpha r (p_y - q_y) + beta (r - s).

    DKD, arXiv 2203.08679, equation 7; forward_kl is TCKD + (1 - p(target)) NCKD. A target in the lumped tail is taken
    out of it, so that TCKD is exact and NCKD a lower bound.
    """
    others = _Others.of(pair, target)
    p_rest, q_rest = others.p.sum(-1), others.q.sum(-1)
    log_ratio = _log(p_rest) - _log(q_rest)
    p_y = target.teacher.exp()
    binary = p_y * (target.teacher - target.student.detach()) + p_rest * log_ratio
    among_others = others.weighted_log_ratio() / _positive(p_rest) - torch.where(p_rest > 0, log_ratio, 0.0)
    of_rest = (beta * (p_rest > 0) - alpha * p_rest) / _positive(q_rest)
    at_others = others.q.mul_(of_rest[:, None]).sub_(others.p.mul_((beta / _positive(p_rest))[:, None]))
    return with_gradient(alpha * binary + beta * among_others, *others.gradients(at_others, -alpha * p_y))


@computes(Atkd)
def atkd(
    pair: PairedLogProbs, target: TargetEvent, *, easy_weight: float, hard_share: float, threshold: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[N], whose mean is easy_weight * (mean NCKD of easy rows) + (1 - easy_weight) * (mean TCKD + NCKD of hard rows),
    and which rows are hard. A row is hard where 1 - p(target) exceeds the threshold.

    ATKD, arXiv 2402.11890; its halves of a batch are here what a threshold makes of them that follows `hard_share`,
    since a row's loss must not depend on which rows come with it.
    """
    hard = (-torch.expm1(target.teacher) > threshold).to(pair.teacher.dtype)
    of_easy, of_hard = easy_weight / (1.0 - hard_share), (1.0 - easy_weight) / hard_share
    values = dkd(pair, target, alpha=hard * of_hard, beta=of_easy + hard * (of_hard - of_easy))
    return values, {"hard_share": hard}


@dataclass(frozen=True, slots=True)
class _Others:
    """The events of a pair without the target: 0 at the target's own event, the rest of the tail where it lies
    there."""

    pair: PairedLogProbs
    target: TargetEvent
    p: torch.Tensor  # [N, E]
    q: torch.Tensor  # [N, E]
    log_p: torch.Tensor  # [N, E]

    @classmethod
    def of(cls, pair: PairedLogProbs, target: TargetEvent) -> _Others:
        at = target.event[:, None]
        log_p = pair.teacher.clamp(min=ABSENT)
        p, q = log_p.exp(), pair.student.detach().exp()
        for values, own in ((p, target.teacher), (q, target.student.detach())):
            values.scatter_(1, at, _rest(values.gather(1, at)[:, 0], own).masked_fill(target.alone, 0.0)[:, None])
        return cls(pair, target, p, q, log_p)

    def weighted_log_ratio(self) -> torch.Tensor:
        """sum p (log p - log q) over the others, [N]; consumes `log_p`."""
        at = self.target.event[:, None]
        ratio = self.log_p.sub_(self.pair.student.detach())
        ratio.scatter_(1, at, _log(self.p.gather(1, at)) - _log(self.q.gather(1, at)))
        return ratio.mul_(self.p).sum(-1)

    def gradients(self, at_others: torch.Tensor, at_target: torch.Tensor) -> list[tuple]:
        """What `with_gradient` takes: gradients by log q of the others [N, E] (overwritten) and of the target [N] as
        gradients by the pair's student and by `target.student`."""
        target = self.target
        at = target.event[:, None]
        if self.pair.exhaustive:
            return [(self.pair.student, lambda: at_others.scatter_(1, at, at_target[:, None]))]
        # log(q_tail - q_y) by log q_tail and by log q_y
        tail, own = self.pair.student.detach().gather(1, at)[:, 0].exp(), target.student.detach().exp()
        by_rest = at_others.gather(1, at)[:, 0] / _positive(_rest(tail, target.student.detach()))
        in_event = torch.where(target.alone, at_target, by_rest * tail)
        in_target = torch.where(target.alone, 0.0, at_target - by_rest * own)
        return [
            (self.pair.student, lambda: at_others.scatter_(1, at, in_event[:, None])),
            (target.student, lambda: in_target),
        ]


def _rest(tail: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What the tail's probability leaves beside the target's, given by its logarithm; below 1e-5 of the tail the
    difference of both would be rounding alone."""
    return torch.maximum(tail - own.exp(), 1e-5 * tail)


def _positive(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def _log(x: torch.Tensor) -> torch.Tensor:
    return _positive(x).log()
