"""Rank and micro-batch of every sequence of a step, fixed before anything is scored.

Pure functions of lengths, so that a resumed run, a restarted group and a test plan the same step.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from collections.abc import Sequence as AbstractSequence

from configs.section import MAIN
from configs.tasks import ResolvedTask
from trainer.errors import DataError
from trainer.types import RankBatch, Sequence, StepPlan, TaskTotals, Unit


def plan_step(
    lengths: AbstractSequence[int],
    *,
    world: int,
    token_budget: int,
    groups: AbstractSequence[AbstractSequence[int]] | None = None,
) -> StepPlan:
    """Deal sequences to ranks by tokens, then pack each rank's into micro-batches of at most `token_budget` tokens.

    `groups` are the positions of sequences that must meet in one micro-batch, because a term compares them; every
    position is in one of them. None: each sequence by itself. All ranks get the same number of micro-batches, the
    missing ones empty: unequal counts end ZeRO-2 with an error and hang ZeRO-3. Longest first to the least loaded rank
    (LPT), then first fit decreasing; ties by position, so the plan depends on lengths and groups alone.

    Raises `DataError` for a group, and `ValueError` for a sequence, that is longer than the budget.
    """
    if groups is not None:
        return _plan_groups(lengths, groups, world=world, token_budget=token_budget)
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


def _plan_groups(
    lengths: AbstractSequence[int], groups: AbstractSequence[AbstractSequence[int]], *, world: int, token_budget: int
) -> StepPlan:
    """The plan of whole groups, each in the place of a sequence as long as all of its members."""
    assert sorted(index for group in groups for index in group) == list(range(len(lengths))), groups
    sums = [sum(lengths[index] for index in group) for group in groups]
    if too_long := [total for total in sums if total > token_budget]:
        raise DataError(
            f"the answers to one prompt have {max(too_long)} tokens together and are compared with each other, which "
            f"needs one micro-batch: set training.micro_batch_tokens to at least {max(too_long)}, it is {token_budget}"
        )
    whole = plan_step(sums, world=world, token_budget=token_budget)
    return StepPlan(
        micro_batches=tuple(
            tuple(tuple(sorted(index for group in batch for index in groups[group])) for batch in batches)
            for batches in whole.micro_batches
        ),
        tokens=whole.tokens,
    )


def groups_of(sequences: AbstractSequence[Sequence], *, compared: Container[str]) -> list[list[int]]:
    """Positions of the sequences that must stay together: answers to one prompt in the tasks whose names are in
    `compared`; each other sequence by itself. In the order of their first member."""
    found: dict[object, list[int]] = {}
    for index, sequence in enumerate(sequences):
        found.setdefault(sequence.group if sequence.task in compared else index, []).append(index)
    return list(found.values())


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
    totals = task_totals(sequences)
    return tuple(
        _rank_batch(sequences, batches, step=step, units_per_rank=units_per_rank, totals=totals)
        for batches in plan.micro_batches
    )


def units_taking_ids(batch: RankBatch, tasks: Mapping[str, ResolvedTask]) -> list[Unit]:
    """The units of a rank that ids are chosen for, in order."""
    labels = {name: task.soft_labels for name, task in tasks.items()}
    return [unit for unit in batch.units if (of_task := labels[unit.kind[0]]) is not None and of_task.takes_ids]


def task_totals(sequences: AbstractSequence[Sequence]) -> dict[str, TaskTotals]:
    """What the terms of each task are divided by, by the task's name."""
    tasks: dict[str, list[Sequence]] = {}
    for sequence in sequences:
        tasks.setdefault(sequence.task, []).append(sequence)
    return {
        name: TaskTotals(
            num_loss_tokens=sum(sequence.num_loss_tokens for sequence in members),
            num_groups=_num_groups(members),
        )
        for name, members in tasks.items()
    }


def _num_groups(members: AbstractSequence[Sequence]) -> int:
    chunks = [one.reading.num_groups for one in members if one.reading is not None and one.reading.chunked]
    return sum(chunks) if chunks else len({sequence.group for sequence in members})


def _unit(members: AbstractSequence[Sequence], *, step: int) -> Unit:
    """Its id names the step and the first stream position, never the rank: a restarted group asks for the same unit."""
    task = "" if members[0].task == MAIN else f"{members[0].task}/"
    return Unit(id=f"{step}/{task}{members[0].id}", sequences=tuple(members))


def _rank_batch(
    sequences: AbstractSequence[Sequence],
    batches: tuple[tuple[int, ...], ...],
    *,
    step: int,
    units_per_rank: int,
    totals: Mapping[str, TaskTotals],
) -> RankBatch:
    kinds: dict[tuple[str, str], list[int]] = {}
    for index in (index for batch in batches for index in batch):
        kinds.setdefault(sequences[index].kind, []).append(index)
    units, place = [], {}
    for indices in kinds.values():
        lengths = [sequences[index].num_tokens for index in indices]
        shares = plan_step(lengths, world=min(units_per_rank, len(indices)), token_budget=sum(lengths))
        for share in shares.micro_batches:
            members = [indices[position] for position in share[0]]
            for inside, index in enumerate(members):
                place[index] = (len(units), inside)
            units.append(_unit([sequences[index] for index in members], step=step))
    return RankBatch(
        step=step,
        units=tuple(units),
        micro_batches=tuple(tuple(place[index] for index in batch) for batch in batches),
        totals=totals,
    )
