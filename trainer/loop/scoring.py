"""Which scorer is asked about a unit, and for which labels: those of its teacher and its task."""

from __future__ import annotations

from collections.abc import Mapping

from configs.labels import Labels, NoLabels
from trainer.protocols import Scorers, TeacherPools
from trainer.types import BlockRef, Unit, UnitReport


class UnitScorers:
    """The scorers of all teachers."""

    def __init__(self, teachers: Mapping[str, TeacherPools], labels: Mapping[str, Labels | NoLabels]) -> None:
        """`teachers` by name, `labels` by task."""
        self._teachers = teachers
        self._labels = labels

    def has_labels(self, unit: Unit) -> bool:
        """Whether its task takes any."""
        return isinstance(self._labels[unit.kind[0]], Labels)

    async def score(self, unit: Unit) -> tuple[UnitReport, BlockRef]:
        """The labels of its task. Raises as `Scorers.score`."""
        task, teacher = unit.kind
        labels = self._labels[task]
        assert isinstance(labels, Labels), unit.id
        return await scorer_of(self._teachers, teacher).score(unit, labels)


def scorer_of(teachers: Mapping[str, TeacherPools], name: str) -> Scorers:
    """Of a teacher; without a name of the only one."""
    pools = teachers[name] if name else next(iter(teachers.values()))
    assert pools.scorer is not None, name
    return pools.scorer
