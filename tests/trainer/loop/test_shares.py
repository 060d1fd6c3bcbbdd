"""Drawing from tasks by share: exact, without chance, and the same after a resume."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from trainer.loop.shares import counts_of_step, next_draws

SHARES = st.dictionaries(st.sampled_from("abcde"), st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0, 2.0, 3.0]), min_size=1)


def test_a_window_of_all_shares_holds_each_task_exactly_by_its_share() -> None:
    draws = next_draws({"chat": 3, "code": 1}, {}, 40)
    assert all(Counter(draws[start : start + 4]) == {"chat": 3, "code": 1} for start in range(0, 40, 4))
    assert next_draws({"a": 0.5, "b": 0.5}, {}, 6) == ("a", "b", "a", "b", "a", "b")


@given(shares=SHARES, num=st.integers(0, 200))
def test_at_every_moment_no_task_is_as_far_from_its_share_as_there_are_other_tasks(
    shares: dict[str, float], num: int
) -> None:
    counts = Counter(next_draws(shares, {}, num))
    total = sum(map(Fraction, shares.values()))
    for name, share in shares.items():
        assert abs(counts[name] - num * Fraction(share) / total) <= max(1, len(shares) - 1)


@given(shares=SHARES, steps=st.lists(st.integers(1, 16), min_size=1, max_size=10))
def test_draws_in_steps_are_the_draws_in_one_go(shares: dict[str, float], steps: list[int]) -> None:
    drawn: Counter[str] = Counter()
    in_steps: list[str] = []
    for size in steps:
        draws = next_draws(shares, drawn, size)
        assert counts_of_step(shares, drawn, size) == {name: draws.count(name) for name in shares}
        drawn.update(draws)
        in_steps += draws
    assert tuple(in_steps) == next_draws(shares, {}, sum(steps))


def test_a_task_with_share_zero_is_never_drawn_and_a_small_share_comes_late_but_comes() -> None:
    draws = next_draws({"none": 0.0, "most": 0.99, "few": 0.01}, {}, 200)
    assert Counter(draws) == {"most": 198, "few": 2}


def test_one_task_has_every_draw() -> None:
    assert counts_of_step({"main": 1.0}, {"main": 7}, 5) == {"main": 5}
