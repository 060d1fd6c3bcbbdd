"""Numbers of terms that move from step to step, against the recursions of their papers, and what a checkpoint keeps."""

from __future__ import annotations

import math

import pytest
import torch

from configs.losses import Atkd, Taid
from trainer.labels.dense import Encoding
from trainer.losses.objective import Objective
from trainer.losses.terms import VALUE, schedule_of

LOSSES = (2.0, 1.5, 1.8, 0.9, 0.9)


def _taid_by_hand(term: Taid, losses: tuple[float, ...], total: int) -> list[float]:
    t, momentum, seen = term.start, 0.0, []
    for step, loss in enumerate(losses, 1):
        if step > 1:
            before = losses[step - 2]
            momentum = term.momentum * momentum + (1 - term.momentum) * (before - loss) / before
            t = t + term.step_size / (1 + math.exp(-momentum)) * (1 - t)
        t = min(term.end, max(t, term.start + (term.end - term.start) * step / total))
        seen.append(t)
    return seen


@pytest.mark.parametrize(("step_size", "total"), [(0.4, 50), (5e-4, 5), (0.0, 5)])
def test_the_target_of_taid_moves_as_the_paper_says_and_ends_at_the_teacher(step_size: float, total: int):
    term = Taid(start=0.3, step_size=step_size, momentum=0.5)
    schedule = schedule_of(term)
    seen = []
    for step, loss in enumerate(LOSSES, 1):
        schedule.advance({VALUE: loss}, step / total)
        seen.append(schedule.arguments()["t"])
    assert seen == pytest.approx(_taid_by_hand(term, LOSSES, total))
    assert seen == sorted(seen)
    assert (seen[-1] == 1.0) == (total == len(LOSSES))


def test_a_falling_loss_moves_the_target_of_taid_faster_than_a_rising_one():
    moved = []
    for loss in (0.5, 2.0):
        schedule = schedule_of(Taid(step_size=0.1, momentum=0.0))
        for value in (1.0, loss):
            schedule.advance({VALUE: value}, 0.0)
        moved.append(schedule.arguments()["t"])
    assert moved[0] > moved[1] > 0.4


def test_the_threshold_of_atkd_finds_the_share_that_is_asked_for():
    schedule, uncertainty = schedule_of(Atkd(hard_share=0.3)), torch.linspace(0, 1, 1001) ** 2
    for _ in range(200):
        hard = (uncertainty > schedule.arguments()["threshold"]).float().mean().item()
        schedule.advance({VALUE: 1.0, "hard_share": hard}, 0.0)
    assert hard == pytest.approx(0.3, abs=0.01)


def test_an_objective_moves_its_schedules_and_goes_on_from_what_a_checkpoint_kept():
    terms = (Taid(), Atkd(), Taid(start=0.1))
    first, second = (Objective.of(terms, Encoding()) for _ in range(2))
    assert first.row_names == ("taid", "atkd", "atkd_hard_share", "taid_2")
    means = {"taid": 1.0, "atkd": 2.0, "atkd_hard_share": 0.9, "taid_2": 1.0}
    first.advance(means, 0.5)
    assert first.told() == pytest.approx({"taid_t": 0.7, "taid_2_t": 0.55})
    assert second.told() != first.told()
    for name, schedule in second.schedules.items():
        schedule.numbers = dict(first.schedules[name].numbers)
    for objective in (first, second):
        objective.advance({**means, "taid": 0.5}, 0.6)
    assert first.told() == second.told()
    assert [s.numbers for s in first.schedules.values()] == [s.numbers for s in second.schedules.values()]
