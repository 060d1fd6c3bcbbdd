"""Labels of several teachers on the same tokens, as `pack` takes them: one block for each unit.

    how: min_ce     each sequence is packed out of the unit and the block of the teacher that was picked for it
    any other       the blocks of a unit become one, columns `<teacher>/<column>`, with `<teacher>/weight` beside them

A teacher that was lost for good is not among those that a unit names: its weight goes to the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np
import torch

from configs.section import TOGETHER
from configs.tasks import Ensemble
from trainer.errors import UnitRejected
from trainer.labels.encoding import ALIGNED, Column
from trainer.loop.packing import Layouts
from trainer.losses.ensemble import WEIGHT
from trainer.types import Sequence, SoftLabelBlock, TokenBatch, Unit

Scored = tuple[Unit, SoftLabelBlock]
"""A unit as one teacher was asked about it, and what it said."""

Pick = Callable[[AbstractSequence[Scored]], np.ndarray]
"""Of each sequence of a unit [S]: which of its teachers has the least cross-entropy on its target ids."""

Place = tuple[int, int]
"""Unit and sequence inside it."""


@dataclass(frozen=True, slots=True)
class Packable:
    """What `pack` is given for the units of a step: `places[u][s]` is where sequence s of unit u stands in them."""

    units: tuple[Unit, ...]
    blocks: tuple[SoftLabelBlock | None, ...]
    layouts: Layouts
    places: tuple[tuple[Place, ...], ...]

    def moved(self, micro_batch: AbstractSequence[Place]) -> list[Place]:
        """Places of the step's units, as places of these."""
        return [self.places[u][s] for u, s in micro_batch]


def packable(
    units: AbstractSequence[Unit],
    scored: Mapping[str, SoftLabelBlock],
    layouts: Layouts,
    *,
    ensembles: Mapping[str, Ensemble | None],
    pick: Pick,
    merge_picked: bool = False,
) -> Packable:
    """`scored` by the id of what was asked, `ensembles` by task. `merge_picked`: of `min_ce` all teachers are kept too,
    weights 1 and 0 tell which was picked."""
    found: list[tuple[Unit, SoftLabelBlock | None]] = []
    of_kinds = dict(layouts)
    places: list[tuple[Place, ...]] = []
    for unit in units:
        asked = [(one, scored[one.id]) for one in unit.asked() if one.id in scored]
        ensemble, start = ensembles.get(unit.kind[0]), len(found)
        first = [(start, s) for s in range(len(unit.sequences))]
        if ensemble is None or not asked:
            found.append((unit, scored.get(unit.id)))
        elif ensemble.how == "min_ce" and not merge_picked:
            picks = pick(asked)
            found += asked
            first = [(start + int(picks[s]), s) for s in range(len(unit.sequences))]
        else:
            _check_ids(asked, ensemble)
            names = [one.kind[1] for one, _ in asked]
            weights = sequence_weights(unit.sequences, ensemble, names)
            if ensemble.how == "min_ce":
                weights = np.eye(len(names))[pick(asked)]
            found.append((unit, _merged(asked, weights, ensemble)))
            of_kinds[unit.kind] = _merged_layout(names, [layouts[one.kind] for one, _ in asked])
        places.append(tuple(first))
    return Packable(tuple(unit for unit, _ in found), tuple(block for _, block in found), of_kinds, tuple(places))


def sequence_weights(
    sequences: AbstractSequence[Sequence], ensemble: Ensemble, teachers: AbstractSequence[str]
) -> np.ndarray:
    """float64 [S, M]: of each of these teachers in each sequence; they sum to one. Raises `ValueError` for a sequence
    that has no weight for any of them."""
    configured = ensemble.weights or dict.fromkeys(ensemble.teachers, 1.0)
    given = [sequence.teacher_weights or configured for sequence in sequences]
    weights = np.array([[own[name] for name in teachers] for own in given], dtype=np.float64)
    sums = weights.sum(1, keepdims=True)
    if not (sums > 0).all():
        sequence = sequences[int(np.argmin(sums[:, 0]))]
        raise ValueError(f"sequence {sequence.id} has no weight for any of {', '.join(teachers)}")
    return weights / sums


@dataclass(frozen=True, slots=True)
class Judged:
    """What a teacher of an ensemble has of a step's loss rows."""

    rows: float  # that it judged, and that count by it: of `min_ce` those for which it was picked
    weight: float  # its weights of them, summed

    def __iter__(self) -> Iterator[float]:
        return iter((self.rows, self.weight))


def judged_of(
    micro_batches: AbstractSequence[TokenBatch], ensembles: Mapping[str, Ensemble]
) -> dict[tuple[str, str], Judged]:
    """By task and teacher, for every teacher of every ensemble."""
    judged = {(task, name): Judged(0, 0) for task, one in ensembles.items() for name in one.teachers}
    for part in (part for batch in micro_batches for part in batch.parts if part.task in ensembles):
        num_rows = part.rows.stop - part.rows.start
        for name in names_of(part.teacher):
            weights = part.labels.get(f"{name}/{WEIGHT}")
            weight = num_rows if weights is None else float(weights.double().sum())
            before = judged[part.task, name]
            judged[part.task, name] = Judged(before.rows + num_rows, before.weight + weight)
    return judged


def weight_shares(judged: Mapping[tuple[str, str], Judged], loss_tokens: Mapping[str, int]) -> dict[str, float]:
    """`teacher/<name>/weight`: of each teacher over the loss tokens of the tasks that ask it together with others."""
    shares = {}
    for name in dict.fromkeys(name for _, name in judged):
        of_tasks = {task: one for (task, other), one in judged.items() if other == name}
        tokens = sum(loss_tokens.get(task, 0) for task in of_tasks)
        total = sum(one.weight for one in of_tasks.values())
        shares[f"teacher/{name}/weight"] = total / tokens if tokens else math.nan
    return shares


def names_of(teacher: str) -> list[str]:
    """Of the teachers that a unit or a part names."""
    return teacher.split(TOGETHER)


def _check_ids(asked: AbstractSequence[Scored], ensemble: Ensemble) -> None:
    """Raises `UnitRejected` where teachers that become one were asked about unlike ids."""
    ids = [block.columns["ids"] for _, block in asked if "ids" in block.columns]
    if ensemble.how == "probability_mean" and not all(np.array_equal(one, ids[0]) for one in ids):
        raise UnitRejected(f"unit {asked[0][0].id}: its labels are of other ids than those of another teacher")


def _merged(asked: AbstractSequence[Scored], weights: np.ndarray, ensemble: Ensemble) -> SoftLabelBlock:
    """`weights` [S, M]. A teacher of which no row is aligned with a row of the student has weight 0 there, and in a
    mixture the others have its share; what no row of any teacher belongs to is not aligned in the whole either."""
    first = asked[0][1]
    of_rows = np.repeat(weights, np.diff(first.row_offsets), axis=0)
    columns: dict[str, np.ndarray] = {}
    if ALIGNED in first.columns:
        reached = np.concatenate([block.columns[ALIGNED] for _, block in asked], axis=1)
        left = of_rows * reached
        sums = left.sum(1, keepdims=True)
        columns[ALIGNED] = (sums > 0).astype(np.float32)
        if ensemble.how != "per_teacher":
            left = np.where(sums > 0, left / np.where(sums > 0, sums, 1), of_rows)
        of_rows = left
    for index, (one, block) in enumerate(asked):
        name = one.kind[1]
        columns |= {f"{name}/{column}": values for column, values in block.columns.items()}
        columns[f"{name}/{WEIGHT}"] = of_rows[:, index : index + 1].astype(np.float32)
    return dataclasses.replace(first, columns=columns)


def _merged_layout(
    names: AbstractSequence[str], layouts: AbstractSequence[AbstractSequence[Column]]
) -> tuple[Column, ...]:
    merged: list[Column] = []
    for name, layout in zip(names, layouts, strict=True):
        merged += [dataclasses.replace(column, name=f"{name}/{column.name}") for column in layout]
        merged.append(Column(f"{name}/{WEIGHT}", torch.float32, 1))
    return (*merged, *(column for column in layouts[0] if column.name == ALIGNED))
