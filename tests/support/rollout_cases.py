"""What student ranks do in tests of `tests/trainer/model/test_rollouts.py`."""

from __future__ import annotations

from pathlib import Path

from rank_processes import Place
from rollout_world import BUDGETS, CASES, train_on_rollouts


def case_rollouts(place: Place) -> dict[tuple[str, int], tuple[list[dict[str, float]], Path]]:
    """Steps of each case, in one micro-batch and in several."""
    return {
        (case, budget): train_on_rollouts(case, place, budget=budget, name=f"{case}-{budget}")
        for case in CASES
        for budget in BUDGETS
    }
