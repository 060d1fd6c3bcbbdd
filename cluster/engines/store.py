"""A scorer behind the label store: sequences that the store knows are read, the rest is asked of an engine and kept.

    score(unit) -> keys of its sequences -> store.read --all there----------------------------------------> block
                                                |                                                             ^
                                                +--some missing--> engine.score(those) --> store.write, join -+

It is the `ScoringEngine` of its process, so that Ray, one process and a run without a teacher use it alike, and no
block passes through the controller. The key is the sequence and not the unit, whose cut changes from run to run; a
block put together from sequences has the bytes of one that was scored as a whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cluster.engines.plan import EnginePlan, StorePlan
from cluster.engines.units import EngineStatistics, check_given, check_unit, label_header, teacher_shape, unit_report
from configs.engines import FromStore
from configs.labels import Labels
from configs.models import ModelSource
from trainer.errors import ConfigError, DeadlineExceeded, UnitRejected
from trainer.labels.encoding import Column, load_encoding
from trainer.labels.ragged import rows_of
from trainer.labels.store import LabelStore
from trainer.labels.store_shard import Columns
from trainer.labels.store_space import LabelSpace, key_of
from trainer.labels.store_writer import Limits
from trainer.model.head import head_width
from trainer.model.load import load_config
from trainer.protocols import ScoringEngine
from trainer.threads import in_thread
from trainer.types import RowIds, SoftLabelBlock, StoreUse, Unit, UnitReport


class Engine(FromStore):
    """What a run from the store alone starts in the place of a teacher."""

    def arguments(self, **_: Any) -> dict[str, Any]:
        return {}

    def start_scorer(self, plan: EnginePlan, name: str) -> StoredScorer:
        return StoredScorer(plan, name, engine=None)

    def start_generator(self, plan: EnginePlan, name: str) -> NoReturn:
        raise ConfigError(f"{name}: the label store writes no answers")


def open_store(plan: StorePlan) -> LabelStore:
    return LabelStore(Path(plan.path), limits=Limits(plan.max_bytes) if plan.writes else None)


def space_of(plan: EnginePlan, labels: Labels, *, hidden_size: int) -> LabelSpace:
    """The space of the labels that a scorer of this plan makes."""
    assert plan.store is not None
    return LabelSpace.of(plan.store.teacher, labels, teacher_shape(plan, hidden_size))


def hidden_size_of(plan: EnginePlan) -> int:
    """Of what the teacher's head reads; no weights are loaded."""
    trusted = plan.trust_remote_code
    source = ModelSource(path=plan.model, revision=plan.revision, trust_remote_code=trusted)
    return head_width(load_config(source, role="teacher.model"), trust_remote_code=trusted)


class StoredScorer:
    """`ScoringEngine` (trainer/protocols.py)."""

    def __init__(self, plan: EnginePlan, name: str, *, engine: ScoringEngine | None) -> None:
        """`engine` makes what the store does not hold; None: nobody does."""
        assert plan.store is not None
        self._plan = plan
        self._name = name
        self._engine = engine
        self._store = open_store(plan.store)
        self._hidden_size = hidden_size_of(plan)
        self._spaces: dict[Labels, LabelSpace] = {}

    async def score(
        self, unit: Unit, encoding: Labels, *, deadline_s: float, given: RowIds | None = None
    ) -> tuple[UnitReport, SoftLabelBlock]:
        """See the protocol; labels on given ids are not kept. Raises `UnitRejected` where labels are missing that
        nobody makes."""
        if self._engine is not None and (unit.is_test or encoding.takes_ids):
            return await self._engine.score(unit, encoding, deadline_s=deadline_s, given=given)
        check_given(unit, given, encoding=encoding, vocabulary_size=self._plan.vocabulary_size)
        check_unit(unit, vocabulary_size=self._plan.vocabulary_size, max_length=self._plan.max_length)
        started_s = time.time()
        if encoding not in self._spaces:
            self._spaces[encoding] = space_of(self._plan, encoding, hidden_size=self._hidden_size)
        space = self._spaces[encoding]
        keys = [key_of(sequence) for sequence in unit.sequences if sequence.num_loss_tokens]
        found = await self._read(space, keys, deadline_s)
        hits = sum(key in found for key in keys)
        use = StoreUse(hits, len(keys) - hits, _num_bytes(found), keeps=self._store.keeps)
        made = None
        if use.misses:
            made, block = await self._make(unit, found, space, encoding, deadline_s=deadline_s)
            if block.tokens_hash == unit.tokens_hash():  # the engine was asked for all of it
                return replace(made, store=use, notes=self._store.notes()), block
        layout = load_encoding(encoding).layout(teacher_shape(self._plan, self._hidden_size))
        block = self._joined(unit, keys, found, encoding, layout)
        report = unit_report(
            unit,
            block,
            replica=self._name,
            encoding=load_encoding(encoding),
            layout=layout,
            score_s=made.score_s if made else 0.0,
            started_s=made.started_s if made else started_s,
        )
        return replace(report, store=use, notes=self._store.notes()), block

    async def _read(self, space: LabelSpace, keys: list[bytes], deadline_s: float) -> dict[bytes, Columns]:
        try:
            async with asyncio.timeout(deadline_s):
                return await in_thread(self._store.read, space, keys)
        except TimeoutError:
            raise DeadlineExceeded(f"{self._name}: the label store gave no answer within {deadline_s:g} s") from None

    async def _make(
        self, unit: Unit, found: dict[bytes, Columns], space: LabelSpace, encoding: Labels, *, deadline_s: float
    ) -> tuple[UnitReport, SoftLabelBlock]:
        """Have the engine score what is not in `found`, put it there, and keep it."""
        missing = {key_of(one): one for one in unit.sequences if one.num_loss_tokens and key_of(one) not in found}
        if self._engine is None:
            notes = "".join(f" {note}" for note in self._store.notes())
            raise UnitRejected(
                f"unit {unit.id}: the label store has no labels for {len(missing)} of its sequences, and store.mode: "
                f"only starts no teacher: run stillhouse label with the same configuration, then this again.{notes}"
            )
        asked = replace(unit, sequences=tuple(missing.values()))
        report, block = await self._engine.score(asked, encoding, deadline_s=deadline_s)
        layout = load_encoding(encoding).layout(teacher_shape(self._plan, self._hidden_size))
        made = dict(zip(missing, split(block, layout), strict=True))
        found |= made
        if self._plan.store.writes and not report.num_non_finite:
            await in_thread(self._store.write, space, made)
        return report, block

    def _joined(
        self,
        unit: Unit,
        keys: list[bytes],
        found: Mapping[bytes, Columns],
        encoding: Labels,
        layout: tuple[Column, ...],
    ) -> SoftLabelBlock:
        """The block of a unit from the labels of its sequences that have any."""
        return SoftLabelBlock(
            header=label_header(self._plan, encoding, hidden_size=self._hidden_size),
            tokens_hash=unit.tokens_hash(),
            columns={column.name: np.concatenate([found[key][column.name] for key in keys]) for column in layout},
            row_offsets=np.cumsum([0, *(one.num_loss_tokens for one in unit.sequences)]).astype(np.int64),
        )

    def statistics(self) -> EngineStatistics:
        """Of the engine."""
        assert self._engine is not None
        return self._engine.statistics()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self.close_store()

    def close_store(self) -> None:
        """What waits in memory is on the disk then; the engine goes on."""
        self._store.close()

    def notes(self) -> tuple[str, ...]:
        """What a person should know and no report said: a disk may fail on the last labels."""
        return self._store.notes()


def split(block: SoftLabelBlock, layout: tuple[Column, ...]) -> list[Columns]:
    """The labels of each sequence of a block, as copies: the block itself may be large and go elsewhere."""
    return [
        {column.name: rows_of(block.columns, column, start, stop).copy() for column in layout}
        for start, stop in pairwise(block.row_offsets.tolist())
    ]


def _num_bytes(found: Mapping[bytes, Columns]) -> int:
    return sum(column.nbytes for columns in found.values() for column in columns.values())
