"""An engine without a model: labels are a function of the tokens, answers one of the seed; slow, strict or broken on
demand. Used where the pool around an engine is tested, never where labels or answers are.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import configs.engines
from configs.labels import Labels
from trainer.errors import DeadlineExceeded, EngineDead, InfrastructureError, UnitRejected
from trainer.types import Completion, GenerationRequest, LabelHeader, RowIds, SoftLabelBlock, Unit, UnitReport


class Engine(configs.engines.Engine):
    delay_s: float = 0.0
    broken: str = ""  # start fails with this text
    refuse_id: int = -1  # units that hold this token are refused
    garbage: bool = False  # answers about other tokens
    stuck: str = ""  # start prints this and never returns
    breaks: str = ""  # "dies" or "hangs" while its process lives, in the first process that makes the file `once`
    once: str = ""

    def arguments(self, **asked: Any) -> dict[str, Any]:
        return {}

    def start_generator(self, plan: Any, name: str) -> Generator:
        return Generator(self, plan)

    def start_scorer(self, plan: Any, name: str) -> Scorer:
        if self.broken:
            raise InfrastructureError(self.broken)
        if self.stuck:
            print(self.stuck, flush=True)
            time.sleep(3600)
        return Scorer(self, plan, name)


class Generator:
    """What it writes is a function of the request's seed and of the prompt."""

    def __init__(self, engine: Engine, plan: Any) -> None:
        self._engine, self._plan = engine, plan

    async def generate(self, requests: Sequence[GenerationRequest], *, deadline_s: float) -> list[Completion]:
        await asyncio.sleep(self._engine.delay_s)
        return [self._completion(request) for request in requests]

    def _completion(self, request: GenerationRequest) -> Completion:
        drawn = np.random.default_rng([request.seed, *request.token_ids]).integers(0, 100, 6).astype(np.int32)
        return Completion(drawn, np.zeros(6, dtype=np.float32), "stop", self._plan.author, ((0, "1"),))

    def close(self) -> None:
        pass


class Scorer:
    def __init__(self, engine: Engine, plan: Any, name: str) -> None:
        self._engine, self._plan, self._name = engine, plan, name
        self._breaks = ""
        if engine.breaks:
            with contextlib.suppress(FileExistsError):
                Path(engine.once).touch(exist_ok=False)
                self._breaks = engine.breaks

    async def score(
        self, unit: Unit, encoding: Labels, *, deadline_s: float, given: RowIds | None = None
    ) -> tuple[UnitReport, SoftLabelBlock]:
        started = time.time()
        if any(self._engine.refuse_id in sequence.token_ids for sequence in unit.sequences):
            raise UnitRejected(f"unit {unit.id} holds token {self._engine.refuse_id}")
        if self._breaks == "dies":
            raise EngineDead(f"the engine {self._name} died: RuntimeError: CUDA error: an illegal memory access")
        if self._breaks == "hangs" or self._engine.delay_s > deadline_s:
            await asyncio.sleep(deadline_s)
            raise DeadlineExceeded("too slow")
        await asyncio.sleep(self._engine.delay_s)
        tokens_hash = "other tokens" if self._engine.garbage else unit.tokens_hash()
        offsets = np.cumsum([0, *(s.num_loss_tokens for s in unit.sequences)])
        values = np.concatenate([s.token_ids[s.loss_mask] for s in unit.sequences]).astype(np.float32)[:, None]
        header = LabelHeader(self._plan.teacher, self._plan.weights_version, encoding, "fake", 100, 8, "float32")
        block = SoftLabelBlock(header, tokens_hash, {"values": values}, offsets)
        report = UnitReport(
            unit.id,
            tokens_hash,
            self._name,
            block.num_rows,
            unit.num_tokens,
            block.num_bytes,
            0,
            1.0,
            time.time() - started,
            started,
        )
        return report, block

    def close(self) -> None:
        pass
