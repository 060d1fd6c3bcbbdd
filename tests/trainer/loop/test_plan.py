"""plan_step and cut_units against their contract, on random lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.loop.plan import cut_units, plan_step
from trainer.types import Sequence

lengths_and_world = st.tuples(st.lists(st.integers(2, 100), max_size=40), st.integers(1, 5), st.integers(100, 300))


def make_sequences(lengths: list[int]) -> list[Sequence]:
    return [
        Sequence(
            prompt_id=f"0:{i}",
            token_ids=np.arange(length, dtype=np.int32),
            loss_mask=np.arange(length) < length - 1,
            author="dataset",
        )
        for i, length in enumerate(lengths)
    ]


@given(lengths_and_world)
@settings(max_examples=200, deadline=None)
def test_every_sequence_is_planned_once_within_budget_and_ranks_are_equally_long(case: tuple) -> None:
    lengths, world, budget = case
    plan = plan_step(lengths, world=world, token_budget=budget)
    seen = sorted(i for rank in plan.micro_batches for batch in rank for i in batch)
    assert seen == list(range(len(lengths)))
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    assert plan.num_micro_batches >= 1
    assert all(sum(lengths[i] for i in batch) <= budget for rank in plan.micro_batches for batch in rank)
    if lengths:  # LPT leaves at most one longest sequence between any two ranks
        assert max(plan.tokens) - min(plan.tokens) <= max(lengths)


@given(lengths_and_world, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_units_hold_each_planned_sequence_exactly_once(case: tuple, units_per_rank: int) -> None:
    lengths, world, budget = case
    sequences = make_sequences(lengths)
    plan = plan_step(lengths, world=world, token_budget=budget)
    batches = cut_units(sequences, plan, step=7, units_per_rank=units_per_rank)
    assert len(batches) == world
    ids = [unit.id for batch in batches for unit in batch.units]
    assert len(ids) == len(set(ids))
    for batch, planned in zip(batches, plan.micro_batches, strict=True):
        assert len(batch.units) <= units_per_rank
        assert batch.num_loss_tokens == sum(length - 1 for length in lengths)
        got = [[batch.units[u].sequences[s].id for u, s in micro] for micro in batch.micro_batches]
        assert got == [[f"0:{i}" for i in micro] for micro in planned]


def test_a_sequence_over_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="120 tokens does not fit a micro-batch of 100"):
        plan_step([5, 120], world=2, token_budget=100)


def test_spans_name_the_loss_rows_of_every_answer() -> None:
    mask = np.array([0, 1, 1, 0, 0, 1, 0], dtype=bool)
    sequence = Sequence(prompt_id="0:0", token_ids=np.arange(7, dtype=np.int32), loss_mask=mask, author="dataset")
    assert sequence.spans() == ((1, 3), (5, 6))
    rows = [row for a, b in sequence.spans() for row in range(a, b)]
    assert rows == np.flatnonzero(mask).tolist()
