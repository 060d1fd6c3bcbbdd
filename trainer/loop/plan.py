"""Rank and micro-batch of every sequence of a step, fixed before anything is scored.

Pure functions of lengths, so that a resumed run, a restarted group and a test plan the same step.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from trainer.types import RankBatch, Sequence, StepPlan, Unit


def plan_step(lengths: AbstractSequence[int], *, world: int, token_budget: int) -> StepPlan:
    """Deal sequences to ranks by tokens, then pack each rank's into micro-batches of at most `token_budget` tokens.

    All ranks get the same number of micro-batches, the missing ones empty: unequal counts end ZeRO-2 with an error and
    hang ZeRO-3. A sequence longer than the budget is the caller's mistake (ValueError). Longest first to the least
    loaded rank (LPT), then first fit decreasing; ties by position, so the plan depends on the lengths alone.
    """
    too_long = [length for length in lengths if length > token_budget]
    if too_long:
        raise ValueError(f"a sequence of {max(too_long)} tokens does not fit a micro-batch of {token_budget} tokens")
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ranks: list[list[int]] = [[] for _ in range(world)]
    tokens = [0] * world
    for index in longest_first:
        rank = tokens.index(min(tokens))
        ranks[rank].append(index)
        tokens[rank] += lengths[index]
    packed = [_first_fit(indices, lengths, token_budget) for indices in ranks]
    count = max(1, *(len(batches) for batches in packed))
    for batches in packed:
        batches.extend([] for _ in range(count - len(batches)))
    return StepPlan(
        micro_batches=tuple(tuple(tuple(sorted(batch)) for batch in batches) for batches in packed),
        tokens=tuple(tokens),
    )


def _first_fit(indices: list[int], lengths: AbstractSequence[int], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for index in indices:
        slot = next((slot for slot, left in enumerate(room) if left >= lengths[index]), None)
        if slot is None:
            batches.append([])
            room.append(token_budget)
            slot = len(batches) - 1
        batches[slot].append(index)
        room[slot] -= lengths[index]
    return batches


def cut_units(
    sequences: AbstractSequence[Sequence], plan: StepPlan, *, step: int, units_per_rank: int = 1
) -> tuple[RankBatch, ...]:
    """One `RankBatch` per rank. A rank's sequences become at most `units_per_rank` units of about equal tokens, so that
    more replicas than ranks all have work."""
    num_loss_tokens = sum(sequence.num_loss_tokens for sequence in sequences)
    return tuple(
        _rank_batch(sequences, batches, step=step, units_per_rank=units_per_rank, num_loss_tokens=num_loss_tokens)
        for batches in plan.micro_batches
    )


def _rank_batch(
    sequences: AbstractSequence[Sequence],
    batches: tuple[tuple[int, ...], ...],
    *,
    step: int,
    units_per_rank: int,
    num_loss_tokens: int,
) -> RankBatch:
    indices = [index for batch in batches for index in batch]
    lengths = [sequences[index].num_tokens for index in indices]
    groups = plan_step(lengths, world=min(units_per_rank, len(indices)) or 1, token_budget=sum(lengths) or 1)
    units, place = [], {}
    for group in groups.micro_batches:
        members = [indices[position] for position in group[0]]
        if not members:
            continue
        for inside, index in enumerate(members):
            place[index] = (len(units), inside)
        # The id names the step and the first stream position, never the rank: a restarted group asks for the same unit.
        units.append(Unit(id=f"{step}/{sequences[members[0]].id}", sequences=tuple(sequences[i] for i in members)))
    return RankBatch(
        step=step,
        units=tuple(units),
        micro_batches=tuple(tuple(place[index] for index in batch) for batch in batches),
        num_loss_tokens=num_loss_tokens,
    )
