"""What counts as getting on between two losses of the student group."""

from __future__ import annotations

from trainer.loop.controller import Setbacks


def test_a_failure_that_comes_back_at_the_same_step_adds_up() -> None:
    setbacks = Setbacks(0)
    counts = []
    for _ in range(4):
        setbacks.add(from_step=4, last_step=7, last_saved=4)
        counts.append(setbacks.count)
    assert counts == [1, 2, 3, 4]


def test_a_step_never_trained_before_begins_the_count_again() -> None:
    setbacks = Setbacks(4)
    setbacks.add(from_step=4, last_step=4, last_saved=4)
    setbacks.add(from_step=4, last_step=3, last_saved=4)
    assert setbacks.count == 2
    setbacks.add(from_step=4, last_step=5, last_saved=4)
    assert setbacks.count == 1


def test_a_newer_checkpoint_is_a_gain_although_the_run_had_been_further() -> None:
    setbacks = Setbacks(0)
    setbacks.add(from_step=0, last_step=160, last_saved=100)
    setbacks.add(from_step=100, last_step=155, last_saved=150)
    assert setbacks.count == 1
    setbacks.add(from_step=150, last_step=155, last_saved=150)
    assert setbacks.count == 2
