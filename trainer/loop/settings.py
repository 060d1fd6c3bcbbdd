"""What the loops need to know of a run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Numbers of one run."""

    total_steps: int
    sequences_per_step: int
    micro_batch_tokens: int
    depth: int
    max_label_bytes: int
    label_bytes_per_row: int
    units_per_rank: int
    max_unit_attempts: int
    evaluate_every: int
    save_every: int
    max_non_finite_steps: int
    save_every_s: float = 0.0  # since the last attempt to save; 0: by steps alone
    compared: frozenset[str] = frozenset()  # tasks with terms that compare the answers to a prompt
    min_aligned: Mapping[str, float] = field(default_factory=dict)  # by task with `align`: its min_ratio
    learns_rewards: Mapping[str, bool] = field(default_factory=dict)
    """The tasks with terms on the student's own text, and whether a term raises rewards of answers."""
    has_held_out_rows: bool = True  # False: there is nothing to evaluate on, also not after the last step

    @property
    def ids_lag(self) -> int:
        """How many steps before its own the ids of a step are chosen: one, so that it is scored while the step before
        is trained, and none where nothing runs ahead."""
        return min(self.depth, 1)


def every(interval: int, step: int) -> bool:
    """Whether something that happens every `interval` steps happens after this one; an interval of 0 means never."""
    return interval > 0 and step % interval == 0
