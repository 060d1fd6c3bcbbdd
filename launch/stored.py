"""What of a run's labels is in its store already, and what is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from cluster.engines.store import hidden_size_of, space_of
from cluster.placement.resolve import Resolved
from configs.labels import Labels
from configs.schema import Run
from trainer.errors import ConfigError
from trainer.labels.store import LabelStore
from trainer.labels.store_space import LabelSpace, key_of
from trainer.loop.rows import Wanted, wanted_labels

if TYPE_CHECKING:
    from trainer.loop.inputs import Inputs

BATCH = 256
"""Sequences that are looked up together."""

MOST_DIFFERENCES = 4


class Spaces:
    """The space of every teacher and encoding of a run."""

    def __init__(self, resolved: Resolved) -> None:
        self._plans = {name: plans.scorer for name, plans in resolved.teachers.items() if plans.scorer is not None}
        self._widths: dict[str, int] = {}
        self._spaces: dict[tuple[str, Labels], LabelSpace] = {}

    def of(self, wanted: Wanted) -> LabelSpace:
        name, found = wanted.teacher, (wanted.teacher, wanted.labels)
        if name not in self._widths:
            self._widths[name] = hidden_size_of(self._plans[name])
        if found not in self._spaces:
            self._spaces[found] = space_of(self._plans[name], wanted.labels, hidden_size=self._widths[name])
        return self._spaces[found]


def batches(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """In their order, `BATCH` at a time."""
    rest = iter(wanted)
    while batch := list(islice(rest, BATCH)):
        yield batch


def by_space(wanted: Iterable[Wanted], spaces: Spaces) -> Iterator[tuple[LabelSpace, dict[bytes, Wanted]]]:
    """Each label once, by its key."""
    found: dict[str, tuple[LabelSpace, dict[bytes, Wanted]]] = {}
    for one in wanted:
        space = spaces.of(one)
        found.setdefault(space.id, (space, {}))[1][key_of(one.sequence)] = one
    yield from found.values()


def refuse_missing(run: Run, inputs: Inputs, resolved: Resolved) -> str:
    """What the store holds of a run that starts no teacher, in words. Reads all of it, since what is damaged is missing
    too, and nobody would make it again. Raises `ConfigError` where not all is there."""
    assert run.store is not None
    store, spaces = LabelStore(run.store.path, limits=None), Spaces(resolved)
    seen: set[tuple[str, bytes]] = set()
    missing: Counter[str] = Counter()
    kinds: dict[str, LabelSpace] = {}
    for batch in batches(wanted_labels(run, inputs)):
        for space, labels in by_space(batch, spaces):
            kinds[space.id] = space
            seen |= {(space.id, key) for key in labels}
            missing[space.id] += len(store.unreadable(space, labels))
    notes = "".join(f"; {note}" for note in store.notes())
    if not missing.total():
        return f"{len(seen)} sequences have labels in {run.store.path}{notes}"
    parts = [f"{count} of {_kind(kinds[name])}" for name, count in missing.items() if count]
    raise ConfigError(
        f"store.mode: only starts no teacher, and {run.store.path} has no labels for {missing.total()} of {len(seen)} "
        f"sequences ({', '.join(parts)}): run stillhouse label with the same configuration, which makes them{notes}"
        + "".join(_hint(kinds[name], store) for name, count in missing.items() if count)
    )


def _kind(space: LabelSpace) -> str:
    return f"kind {space.fields['encoding']['kind']}"


def _hint(space: LabelSpace, store: LabelStore) -> str:
    """The labels in the store that are nearest to those that it does not hold at all."""
    others = store.spaces()
    if not others or any(other.id == space.id for other in others):
        return ""
    nearest = min((space.difference(other) for other in others), key=len)
    if len(nearest) > MOST_DIFFERENCES:
        return ""
    return f". It has labels that differ from those of {_kind(space)} in {'; '.join(nearest)}"
