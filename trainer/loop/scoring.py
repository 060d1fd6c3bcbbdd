"""Units are scored, each by the scorer of its teacher, and handed to the students; what is lost on the way is scored
again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from types import MappingProxyType
from weakref import WeakValueDictionary

from configs.labels import Labels
from configs.section import TOGETHER
from configs.tasks import Ensemble
from trainer.errors import InfrastructureError, LabelsLost, TeachersLost
from trainer.loop.together import names_of, sequence_weights
from trainer.protocols import Observer, Scorers, TeacherPools
from trainer.types import BlockRef, RankBatch, RowIdsRef, Unit, UnitReport

Scored = tuple[UnitReport, BlockRef]


class UnitScorers:
    """The scorers of all teachers."""

    def __init__(
        self,
        teachers: Mapping[str, TeacherPools],
        labels: Mapping[str, Labels | None],
        ensembles: Mapping[str, Ensemble] = MappingProxyType({}),
        joined: Mapping[str, Labels] = MappingProxyType({}),
        *,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`teachers` by name, the others by task. `joined`: of tasks whose teachers are asked twice, what the second
        request asks for. `note` tells people of a teacher that is gone on without, once."""
        self._teachers = teachers
        self._labels = labels
        self._ensembles = ensembles
        self._joined = joined
        self._note = note
        # A first request is awaited by every teacher's second one, and kept no longer than that.
        self._first: WeakValueDictionary[str, asyncio.Task[dict[str, Scored | None]]] = WeakValueDictionary()
        self._lost: set[tuple[str, str]] = set()

    def asked(self, unit: Unit) -> tuple[Unit, ...]:
        """What teachers are asked about it; nothing where its task takes no labels."""
        return () if self._labels[unit.kind[0]] is None else unit.asked()

    @property
    def any_takes_ids(self) -> bool:
        """Whether ids are to be chosen for a task of the run."""
        return any(labels is not None and labels.takes_ids for labels in self._labels.values())

    def takes_ids(self, unit: Unit) -> bool:
        """Whether the labels of its task are of ids that are chosen for it."""
        labels = self._labels[unit.kind[0]]
        return labels is not None and labels.takes_ids

    async def score(self, unit: Unit, given: RowIdsRef | None = None) -> Scored | None:
        """The labels of its task; None of a teacher that is lost for good where the task goes on without. Raises as
        `Scorers.score`, and `LabelsLost` where those of a first request are gone."""
        task = unit.kind[0]
        labels = self._labels[task]
        assert labels is not None, unit.id
        if task not in self._joined:
            return await self._ask(unit, labels, given)
        first = await self._first_request(unit, labels)
        own, of_all = first[unit.id], tuple(one[1] for one in first.values() if one is not None)
        if own is None:
            return None
        try:
            scored = await self._ask(unit, self._joined[task], of_all)
        except LabelsLost:
            self._first.pop(_without_teacher(unit), None)
            raise
        return None if scored is None else (_added(own[0], scored[0]), scored[1])

    async def _ask(
        self, unit: Unit, labels: Labels, given: RowIdsRef | tuple[BlockRef, ...] | None = None
    ) -> Scored | None:
        ensemble = self._ensembles.get(unit.kind[0])
        try:
            scorer, asked = scorer_of(self._teachers, unit.kind[1]), unit.as_read()
            return await (scorer.score(asked, labels) if given is None else scorer.score(asked, labels, given))
        except TeachersLost as error:
            if ensemble is None or ensemble.on_lost == "end":
                raise
            self._tell(unit.kind, error)
            return None

    async def _first_request(self, unit: Unit, labels: Labels) -> dict[str, Scored | None]:
        """What every teacher of the ensemble keeps of a unit's rows, by the id of what it was asked; one request serves
        all teachers that wait for it."""
        base = _without_teacher(unit)

        async def ask_all() -> dict[str, Scored | None]:
            names = self._ensembles[unit.kind[0]].teachers
            siblings = [unit.of_teacher(name, f"{base}@{name}") for name in names]
            return await _score_all(siblings, lambda one: self._ask(one, labels))

        asked = self._first.get(base)
        if asked is None:
            asked = self._first[base] = asyncio.create_task(ask_all(), name=f"unit {base}")
        return await asked

    def left(self, batch: RankBatch, scored: Mapping[str, Scored | None]) -> RankBatch:
        """The batch as it was scored: its units name the teachers whose labels are there. Raises `TeachersLost` where
        that is none, or none with a weight."""
        return replace(batch, units=tuple(self._left(unit, scored) for unit in batch.units))

    def _left(self, unit: Unit, scored: Mapping[str, Scored | None]) -> Unit:
        asked = self.asked(unit)
        ensemble = self._ensembles.get(unit.kind[0])
        left = [one for one in asked if scored[one.id] is not None]
        if ensemble is None or len(left) == len(asked):
            return unit
        names = [one.kind[1] for one in left]
        if not left:
            raise TeachersLost(f"every teacher of the ensemble is lost ({', '.join(names_of(unit.kind[1]))})")
        try:
            sequence_weights(unit.sequences, ensemble, names)
        except ValueError as error:
            raise TeachersLost(f"{error}: the rest of the ensemble is lost") from None
        return left[0] if len(left) == 1 else unit.of_teacher(TOGETHER.join(names), unit.id)

    def _tell(self, kind: tuple[str, str], error: TeachersLost) -> None:
        if kind not in self._lost:
            self._lost.add(kind)
            text = f"teacher {kind[1]} is lost for good, and the run goes on with the rest of the ensemble (on_lost: "
            self._note(f"{text}continue): {error}; teacher/{kind[1]}/lost_rows in metrics.jsonl counts")


def _without_teacher(unit: Unit) -> str:
    """The id of the unit that a teacher was asked about as one of several."""
    return unit.id.rpartition("@")[0]


def _added(first: UnitReport, second: UnitReport) -> UnitReport:
    """Of two requests about one unit: the labels are those of the second, and a store keeps those of the first."""
    return replace(second, score_s=first.score_s + second.score_s, started_s=first.started_s, store=first.store)


def scorer_of(teachers: Mapping[str, TeacherPools], name: str) -> Scorers:
    """Of a teacher; without a name of the only one."""
    pools = teachers[name] if name else next(iter(teachers.values()))
    assert pools.scorer is not None, name
    return pools.scorer


async def score_and_stage(
    what: str,
    units: AbstractSequence[Unit],
    scored: dict[str, Scored | None],
    *,
    score: Callable[[Unit], Awaitable[Scored | None]],
    stage: Callable[[], Awaitable[None]],
    attempts: int,
    observer: Observer,
) -> None:
    """Score the units that are not in `scored` (by id) yet, all at once, into it; then `stage` what is in it. Those
    whose labels are lost meanwhile are scored again, as often as `attempts` allows; of several teachers by all, since
    the ids of one request are joined. `what` is for people."""
    for attempt in range(attempts):
        try:
            scored |= await _score_all([unit for unit in units if unit.id not in scored], score)
            return await stage()
        except LabelsLost as lost:
            observer.event("labels_lost", units=list(lost.unit_ids), attempt=attempt)
            for unit_id in lost.unit_ids:
                _forget(unit_id, scored)
    raise InfrastructureError(f"the labels of {what} were lost {attempts} times in a row")


def _forget(unit_id: str, scored: dict[str, Scored | None]) -> None:
    """Of a rank that lost one unit, those without labels are named too."""
    base = unit_id.rpartition("@")[0]
    for other in [one for one in scored if one == unit_id or (base and one.rpartition("@")[0] == base)]:
        del scored[other]


async def _score_all(
    units: AbstractSequence[Unit], score: Callable[[Unit], Awaitable[Scored | None]]
) -> dict[str, Scored | None]:
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
