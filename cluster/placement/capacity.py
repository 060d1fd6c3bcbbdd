"""Can these groups be placed on these machines at all? A search over assignments of bundles to nodes. Pure.

    bundles, largest first -> each node that may take it (one of each sort) -> next bundle ... -> the loose ranks

Only what is proven impossible is refused: a search that grows too large answers "perhaps", and Ray decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cluster.placement.groups import Group
from cluster.placement.hardware import Hardware, Node
from cluster.runtime import STUDENT

MAX_TRIES = 20_000
KIND_PREFIX = "accelerator_type:"
NODE_ID = "ray.io/node-id"  # the label that no two nodes share


class TooMany(Exception):
    """The search was given up."""


@dataclass(slots=True)
class _Room:
    """What is left of one node."""

    node: Node
    slots: float
    gpus: int
    users: list[int] = field(default_factory=list)  # ids of the groups whose bundles lie here

    @property
    def kind(self) -> str | None:
        return self.node.gpus[0] if self.node.gpus else None

    def holds(self, group: Group, bundle: int, kind: str | None) -> bool:
        """`kind`: of GPU, where the plan asks for one."""
        wanted = group.bundles[bundle]
        return (
            self.slots >= wanted.get("CPU", 0)
            and self.gpus >= wanted.get("GPU", 0)
            and (kind is None or self.kind == kind)
            and group.labels.items() <= self.node.labels.items()
        )

    def take(self, group: Group, bundle: int, sign: int = 1) -> None:
        wanted = group.bundles[bundle]
        self.slots -= sign * wanted.get("CPU", 0)
        self.gpus -= sign * int(wanted.get("GPU", 0))
        if sign > 0:
            self.users.append(id(group))
        else:
            self.users.remove(id(group))

    def sort(self) -> tuple[object, ...]:
        """Nodes of one sort are interchangeable for what is still to be placed."""
        labels = tuple(sorted(item for item in self.node.labels.items() if item[0] != NODE_ID))
        return self.kind, labels, self.slots, self.gpus, tuple(sorted(self.users))


def named_kind(group: Group) -> str | None:
    """The kind of GPU that a group's bundles name."""
    names = (key.removeprefix(KIND_PREFIX) for key in group.bundles[0] if key.startswith(KIND_PREFIX))
    return next(names, None)


def fit(groups: Sequence[Group], hardware: Hardware, student_kind: str | None = None) -> dict[str, str | None] | None:
    """The kind of GPU that each group gets (None: several, or it does not matter), or None where it cannot be.

    `student_kind`: put the ranks on this kind of GPU, and the teachers on others where there is a choice.
    """
    rooms = [
        _Room(node, float("inf") if node.num_slots is None else node.num_slots, len(node.gpus))
        for node in hardware.nodes
    ]
    # The ranks take single GPUs and never block each other: placing them last leaves whole nodes to teachers.
    ordered = sorted(groups, key=lambda group: group.role == STUDENT)
    loose = [group for group in ordered if _is_loose(group)]
    bound = [(group, bundle) for group in ordered if not _is_loose(group) for bundle in range(len(group.bundles))]
    try:
        return _Search(rooms, bound, loose, student_kind).run()
    except TooMany:
        return dict.fromkeys(group.name for group in groups)


def _is_loose(group: Group) -> bool:
    """Equal small bundles that may sit anywhere: counted in place of being searched for."""
    small = all(bundle.get("CPU", 0) <= 1 and bundle.get("GPU", 0) <= 1 for bundle in group.bundles)
    return small and group.strategy in ("PACK", "SPREAD")


@dataclass(slots=True)
class _Search:
    rooms: list[_Room]
    bound: list[tuple[Group, int]]
    loose: list[Group]
    student_kind: str | None
    tries: int = 0
    where: dict[int, list[_Room]] = field(default_factory=dict)  # by id of the group

    def run(self) -> dict[str, str | None] | None:
        return self._place(0)

    def _place(self, index: int) -> dict[str, str | None] | None:
        if index == len(self.bound):
            return self._place_loose()
        group, bundle = self.bound[index]
        for room in self._candidates(group, bundle):
            self.tries += 1
            if self.tries > MAX_TRIES:
                raise TooMany
            room.take(group, bundle)
            self.where.setdefault(id(group), []).append(room)
            found = self._place(index + 1)
            if found is not None:
                return found
            self.where[id(group)].pop()
            room.take(group, bundle, sign=-1)
        return None

    def _candidates(self, group: Group, bundle: int) -> list[_Room]:
        """Nodes that may take the bundle, the best first: one of each sort."""
        used = self.where.get(id(group), [])
        avoid = self.student_kind if group.role != STUDENT else None
        able = [room for room in self._allowed(group, used) if room.holds(group, bundle, self._kind(group))]
        spread = group.strategy == "SPREAD"

        def order(room: _Room) -> tuple[object, ...]:
            return (avoid is not None and room.kind == avoid, spread and room in used, room.gpus, room.slots)

        sorts = {room.sort(): room for room in sorted(able, key=order, reverse=True)}
        return sorted(sorts.values(), key=order)

    def _allowed(self, group: Group, used: list[_Room]) -> Iterator[_Room]:
        for room in self.rooms:
            taken = any(room is other for other in used)
            if group.strategy == "STRICT_SPREAD" and taken:
                continue
            if group.strategy == "STRICT_PACK" and used and not taken:
                continue
            yield room

    def _place_loose(self) -> dict[str, str | None] | None:
        """Single slots and GPUs from the fullest nodes on; leaves the rooms as they were."""
        taken: list[tuple[_Room, Group]] = []
        kinds = {group.name: {room.kind for room in self.where[id(group)]} for group, _ in self.bound}
        # Whoever may sit on fewer nodes is served first.
        for group in sorted(self.loose, key=lambda g: sum(r.holds(g, 0, self._kind(g)) for r in self.rooms)):
            able = [room for room in self.rooms if room.holds(group, 0, self._kind(group))]
            kinds[group.name] = set()
            missing = len(group.bundles)
            for room in sorted(able, key=lambda room: (room.gpus, room.slots)):
                while missing and room.holds(group, 0, None):
                    room.take(group, 0)
                    taken.append((room, group))
                    kinds[group.name].add(room.kind)
                    missing -= 1
            if missing:
                for room, one in taken:
                    room.take(one, 0, sign=-1)
                return None
        return {name: next(iter(found)) if len(found) == 1 else None for name, found in kinds.items()}

    def _kind(self, group: Group) -> str | None:
        return named_kind(group) or (self.student_kind if group.role == STUDENT else None)
