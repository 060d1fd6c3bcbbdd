"""One replica of a teacher, or of the student for rollouts, as a Ray actor: the process around an engine.
`cluster/teachers/pool.py` keeps the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster import runtime
from cluster.engines.plan import EnginePlan
from cluster.lifecycle.logs import SharedFolder, redirect_output
from cluster.lifecycle.processes import ProcessIdentity, own_shared_memory, this_process
from cluster.model_files import local_copy
from cluster.runtime import SCORER
from configs.engines import ENGINES
from configs.labels import Labels
from trainer.build import check_build
from trainer.imports import uncollected
from trainer.labels.joined import row_ids
from trainer.protocols import GeneratingEngine, ScoringEngine
from trainer.types import Completion, GenerationRequest, RowIds, SoftLabelBlock, Unit, UnitReport, WeightBucket


def start_engine(
    plan: EnginePlan, name: str, *, beside: GeneratingEngine | None = None
) -> ScoringEngine | GeneratingEngine:
    """The engine a plan names, started in this process, on the node's own copy of the model where one is asked for.

    `beside`: that of `plan.beside`, whose weights a scorer takes where they are the same.
    """
    if plan.local_copy is not None:
        copy = local_copy(plan.model, Path(plan.local_copy), timeout_s=plan.start_timeout_s)
        plan = replace(plan, model=str(copy))
    with uncollected():
        from cluster.engines.store import StoredScorer

        engine = ENGINES.load(plan.engine)
    if plan.role != SCORER:
        return engine.start_generator(plan, name)
    scorer = engine.start_scorer(plan, name)
    share = getattr(engine, "share_weights", None)
    if beside is not None and share and (plan.engine.kind, plan.dtype) == (plan.beside.engine.kind, plan.beside.dtype):
        share(scorer, beside)
    return scorer if plan.store is None or isinstance(scorer, StoredScorer) else StoredScorer(plan, name, engine=scorer)


@dataclass(frozen=True, slots=True)
class Engines:
    """What one replica runs: the engine of its plan, and the one beside it or once more the same."""

    scorer: Any
    generator: Any

    @classmethod
    def start(cls, plan: EnginePlan, name: str) -> Engines:
        """The one beside first: the twin of a scorer replaces its architecture in vLLM's registry."""
        if plan.beside is None:
            engine = start_engine(plan, name)
            return cls(engine, engine)
        generator = start_engine(plan.beside, name)
        return cls(start_engine(plan, name, beside=generator), generator)

    def close(self) -> tuple[str, ...]:
        """Returns what a person should know that came out now."""
        self.scorer.close()
        if self.generator is not self.scorer:
            self.generator.close()
        return last_notes(self.scorer)


def last_notes(engine: Any) -> tuple[str, ...]:
    """Of an engine that was closed: those of its store."""
    return engine.notes() if hasattr(engine, "notes") else ()


class TeacherActor:
    """One replica: builds its engines, forwards calls. Its process environment was set by the placement."""

    def __init__(self, plan: EnginePlan, name: str, folder: SharedFolder) -> None:
        redirect_output(folder, name)
        runtime.set_network(plan.role)
        self._folder = folder
        self._plan = plan
        self._name = name
        self._engines: Engines | None = None

    async def identify(self) -> ProcessIdentity:
        check_build()
        self._folder.check()
        return this_process()

    async def start(self) -> tuple[str, ...]:
        """Load the model. Returns the shared memory that the engine has, which outlives it where it is killed."""
        self._engines = await asyncio.to_thread(Engines.start, self._plan, self._name)
        return own_shared_memory()

    async def ping(self) -> None:
        """Answers while the engine works: it has a thread of its own."""

    async def score(
        self, unit: Unit, encoding: Labels, deadline_s: float, *given: RowIds | SoftLabelBlock | None
    ) -> tuple[UnitReport, SoftLabelBlock]:
        """`given` are arguments of their own, so Ray brings them to this node before the call starts."""
        ids = row_ids(unit, encoding, given)
        return await self._engines.scorer.score(unit, encoding, deadline_s=deadline_s, given=ids)

    async def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> list[Completion]:
        return await self._engines.generator.generate(requests, deadline_s=deadline_s)

    async def take(self, bucket: WeightBucket, deadline_s: float) -> None:
        await self._engines.generator.take(bucket, deadline_s=deadline_s)

    async def logprobs(self, token_ids: np.ndarray, deadline_s: float) -> np.ndarray:
        return await self._engines.generator.logprobs(token_ids, deadline_s=deadline_s)

    async def close(self) -> tuple[str, ...]:
        """As that of `Engines`."""
        return () if self._engines is None else await asyncio.to_thread(self._engines.close)
