"""Units are scored, each by the scorer of its teacher, and handed to the students; what is lost on the way is scored
again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Sequence as AbstractSequence

from configs.labels import Labels
from trainer.errors import InfrastructureError, LabelsLost
from trainer.protocols import Observer, Scorers, TeacherPools
from trainer.types import BlockRef, Unit, UnitReport

Scored = tuple[UnitReport, BlockRef]


class UnitScorers:
    """The scorers of all teachers."""

    def __init__(self, teachers: Mapping[str, TeacherPools], labels: Mapping[str, Labels | None]) -> None:
        """`teachers` by name, `labels` by task."""
        self._teachers = teachers
        self._labels = labels

    def has_labels(self, unit: Unit) -> bool:
        """Whether its task takes any."""
        return self._labels[unit.kind[0]] is not None

    async def score(self, unit: Unit) -> Scored:
        """The labels of its task. Raises as `Scorers.score`."""
        task, teacher = unit.kind
        labels = self._labels[task]
        assert labels is not None, unit.id
        return await scorer_of(self._teachers, teacher).score(unit, labels)


def scorer_of(teachers: Mapping[str, TeacherPools], name: str) -> Scorers:
    """Of a teacher; without a name of the only one."""
    pools = teachers[name] if name else next(iter(teachers.values()))
    assert pools.scorer is not None, name
    return pools.scorer


async def score_and_stage(
    what: str,
    units: AbstractSequence[Unit],
    scored: dict[str, Scored],
    *,
    score: Callable[[Unit], Awaitable[Scored]],
    stage: Callable[[], Awaitable[None]],
    attempts: int,
    observer: Observer,
) -> None:
    """Score the units that are not in `scored` (by id) yet, all at once, into it; then `stage` what is in it. Those
    whose labels are lost meanwhile are scored again, as often as `attempts` allows. `what` is for people."""
    for attempt in range(attempts):
        scored |= await _score_all([unit for unit in units if unit.id not in scored], score)
        try:
            return await stage()
        except LabelsLost as lost:
            observer.event("labels_lost", units=list(lost.unit_ids), attempt=attempt)
            for unit_id in lost.unit_ids:
                scored.pop(unit_id, None)  # of a rank that lost one, those without labels are named too
    raise InfrastructureError(f"the labels of {what} were lost {attempts} times in a row")


async def _score_all(units: AbstractSequence[Unit], score: Callable[[Unit], Awaitable[Scored]]) -> dict[str, Scored]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {unit.id: group.create_task(score(unit), name=f"unit {unit.id}") for unit in units}
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    return {unit_id: task.result() for unit_id, task in tasks.items()}


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The error that a person should see: the first that is no cancellation, from the innermost group."""
    for error in group.exceptions:
        found = first_error(error) if isinstance(error, BaseExceptionGroup) else error
        if not isinstance(found, asyncio.CancelledError):
            return found
    return group.exceptions[0]
