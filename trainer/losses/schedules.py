"""Numbers of a term that move while a run trains, equal on all ranks and part of every checkpoint.

A schedule stands under `@follows(Class)` of its term. The function of that term gets `arguments()` of it in place of
the term's fields. After each step that learnt something it is told the means of the term's rows over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from configs.losses import Atkd, Taid
from trainer.losses.terms import VALUE, Schedule, follows


@follows(Taid)
class TowardsTheTeacher(Schedule):
    """TAID, arXiv 2501.16937, equation 7: t grows with the run's progress, and faster while the loss falls.

    change = (L_before - L) / L_before;  m <- momentum m + (1 - momentum) change
    t <- min(end, max(start + (end - start) progress, t + step_size sigmoid(m) (1 - t)))
    """

    def __init__(self, term: Taid) -> None:
        self._term = term
        self.numbers = {"t": term.start, "momentum": 0.0, "before": math.nan}

    def arguments(self) -> dict[str, float]:
        return {"t": self.numbers["t"]}

    def told(self) -> dict[str, float]:
        return {"t": self.numbers["t"]}

    def advance(self, means: Mapping[str, float], progress: float) -> None:
        term, old, loss = self._term, self.numbers, means[VALUE]
        momentum, t = old["momentum"], old["t"]
        if old["before"] > 0:  # False for NaN, before the first step
            momentum = term.momentum * momentum + (1 - term.momentum) * (old["before"] - loss) / old["before"]
            t += term.step_size / (1 + math.exp(-momentum)) * (1 - t)
        t = min(term.end, max(term.start + (term.end - term.start) * progress, t))
        self.numbers = {"t": t, "momentum": momentum, "before": loss}


@follows(Atkd)
class HardShare(Schedule):
    """The threshold of `hard` rows goes up by a tenth of the surplus where too many were, and down where too few."""

    def __init__(self, term: Atkd) -> None:
        self._term = term
        self.numbers = {"threshold": 0.5}

    def arguments(self) -> dict[str, float]:
        return {**self._term.parameters(), **self.numbers}

    def advance(self, means: Mapping[str, float], progress: float) -> None:
        surplus = means["hard_share"] - self._term.hard_share
        self.numbers = {"threshold": min(1.0, max(0.0, self.numbers["threshold"] + 0.1 * surplus))}
