"""What tests let a process of its own do with vLLM, which changes the process it runs in (threads, environment, RNG).

`vllm_process` starts it; the functions here run in it and return plain data. Importing vLLM is the expensive part.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from label_oracle import VOCABULARY, random_given_ids, random_unit
from transformers import AutoConfig

from cluster.engines.plan import EnginePlan
from cluster.engines.vllm_limits import vllm_overrides
from cluster.runtime import environment
from configs.labels import LABELS, Hidden, Labels
from trainer.errors import DeadlineExceeded, EngineDead, StillhouseError
from trainer.types import Completion, GenerationRequest, Unit, UnitReport

DEADLINE_S = 120.0


@contextmanager
def vllm_process() -> Iterator[ProcessPoolExecutor]:
    """One process with the environment of a CPU scorer."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=become_scorer) as pool:
        yield pool


def become_scorer() -> None:
    """Runs in the new process before vLLM is imported."""
    os.environ.update(environment("scorer", "cpu"))


def engine_plan(engine: Any, folder: Path, *, role: str = "scorer", **changes: Any) -> EnginePlan:
    """A float32 CPU plan for a folder of tests/support/tiny_models.py."""
    tensor_parallel_size = changes.pop("tensor_parallel_size", 1)
    max_length = changes.pop("max_length", 256)
    arguments = engine.arguments(
        role=role,
        dtype="float32",
        tensor_parallel_size=tensor_parallel_size,
        max_length=max_length,
        accelerator="cpu",
        stop_strings=changes.pop("stop_strings", False),
    )
    if "runner" in arguments:  # of vLLM
        overrides = vllm_overrides(AutoConfig.from_pretrained(folder))
        arguments["hf_overrides"] = arguments.get("hf_overrides", {}) | overrides
    values = {
        "role": role,
        "engine": engine,
        "model": str(folder),
        "revision": None,
        "trust_remote_code": False,
        "dtype": "float32",
        "device_type": "cpu",
        "tensor_parallel_size": tensor_parallel_size,
        "max_length": max_length,
        "arguments": arguments,
        "environment": {},
        "teacher": "tiny",
        "weights_version": "1",
        "tokenizer_fingerprint": "fingerprint",
        "vocabulary_size": VOCABULARY,
        **changes,
    }
    return EnginePlan(**values)


def tiny_engine(**parameters: Any) -> Any:
    """A vLLM engine with a small cache."""
    from cluster.engines.vllm import Engine

    return Engine(**{"kv_cache_bytes": 32 * 2**20, **parameters})


def score_once(
    folder: Path,
    unit: Unit,
    specs: tuple[Labels, ...],
    *,
    tensor_parallel_size: int = 1,
    plan: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> list[tuple[UnitReport, dict[str, np.ndarray]]]:
    """Start a scorer, score the unit with each encoding at the same time, stop the scorer. `plan`: changes of it."""
    engine, changes = tiny_engine(**parameters), {"tensor_parallel_size": tensor_parallel_size, **(plan or {})}
    scorer = engine.start_scorer(engine_plan(engine, folder, **changes), "scorer-0")

    async def score_all() -> list[Any]:
        given = [random_given_ids(unit, spec.num_given) if spec.takes_ids else None for spec in specs]
        asked = zip(specs, given, strict=True)
        return await asyncio.gather(*(scorer.score(unit, s, deadline_s=DEADLINE_S, given=ids) for s, ids in asked))

    try:
        return [(report, dict(block.columns)) for report, block in asyncio.run(score_all())]
    finally:
        scorer.close()


@dataclass(frozen=True)
class Behaviour:
    """What was seen of one scorer under concurrent calls."""

    steps_alone: int
    steps_together: int
    units_together: int
    equal_together: bool
    ticks_while_scoring: int
    deadline_error: str
    deadline_seen_after_s: float
    steps_of_aborted: int  # of a unit of `LONG` steps past its deadline, counted when no more are taken
    scores_after_abort: bool
    deaths: tuple[BaseException, ...]  # of a unit beside the broken one, of the broken one, of a later one
    still_alive_s: float  # what `close` took after the death


def observe_behaviour(folder: Path) -> Behaviour:
    """All asynchronous demands on one engine; its death last."""
    engine = tiny_engine(max_num_batched_tokens=256)
    scorer = engine.start_scorer(engine_plan(engine, folder), "scorer-0")
    seen: dict[str, Any] = {}

    async def main() -> None:
        await joins(scorer, seen)
        await stays_responsive(scorer, seen)
        await aborts(scorer, seen)
        await dies(scorer, seen)

    asyncio.run(main())
    started = time.monotonic()
    scorer.close()
    return Behaviour(**seen, still_alive_s=time.monotonic() - started)


HIDDEN = Hidden()


async def joins(scorer: Any, seen: dict[str, Any]) -> None:
    a = random_unit("a", *[(101, [(10, 100)])] * 3, seed=1)
    b = random_unit("b", *[(101, [(10, 100)])] * 3, seed=2)
    before = scorer.statistics().num_steps
    alone = [(await scorer.score(unit, HIDDEN, deadline_s=DEADLINE_S))[1] for unit in (a, b)]
    between = scorer.statistics().num_steps
    together = []
    while len(together) < 5 and 3 not in together:  # the first step may begin before the second unit has arrived
        start = scorer.statistics().num_steps
        answers = await asyncio.gather(*(scorer.score(unit, HIDDEN, deadline_s=DEADLINE_S) for unit in (a, b)))
        together.append(scorer.statistics().num_steps - start)
    pairs = zip(alone, (block for _, block in answers), strict=True)
    seen["steps_alone"], seen["steps_together"] = between - before, min(together)
    seen["units_together"] = scorer.statistics().max_concurrent_units
    seen["equal_together"] = all(np.allclose(x.columns["hidden"], y.columns["hidden"], atol=1e-4) for x, y in pairs)


LONG = 600


def long_unit() -> Unit:
    """About as many steps of 256 tokens."""
    return random_unit("long", *[(250, [(0, 249)])] * LONG)


async def stays_responsive(scorer: Any, seen: dict[str, Any]) -> None:
    scoring = asyncio.create_task(
        scorer.score(random_unit("m", *[(250, [(0, 249)])] * 60), HIDDEN, deadline_s=DEADLINE_S)
    )
    ticks = 0
    while not scoring.done():
        await asyncio.sleep(0.005)
        ticks += 1
    await scoring
    seen["ticks_while_scoring"] = ticks


async def aborts(scorer: Any, seen: dict[str, Any]) -> None:
    before, started = scorer.statistics().num_steps, time.monotonic()
    try:
        await scorer.score(long_unit(), HIDDEN, deadline_s=0.2)
    except DeadlineExceeded as error:
        seen["deadline_error"] = str(error)
    seen["deadline_seen_after_s"] = time.monotonic() - started
    steps = None
    while steps != (steps := scorer.statistics().num_steps):
        await asyncio.sleep(0.5)
    seen["steps_of_aborted"] = steps - before
    report, _ = await scorer.score(random_unit("next", (20, [(3, 9)])), HIDDEN, deadline_s=DEADLINE_S)
    seen["scores_after_abort"] = report.num_rows == 6


async def dies(scorer: Any, seen: dict[str, Any]) -> None:
    beside = asyncio.create_task(scorer.score(long_unit(), HIDDEN, deadline_s=DEADLINE_S))
    await asyncio.sleep(0.05)
    broken = scorer.score(
        random_unit("broken", (20, [(3, 9)])), LABELS.validate("fakes.broken_encoding"), deadline_s=DEADLINE_S
    )
    errors = list(await asyncio.gather(beside, broken, return_exceptions=True))
    try:
        await scorer.score(random_unit("later", (20, [(3, 9)])), HIDDEN, deadline_s=DEADLINE_S)
    except EngineDead as error:
        errors.append(error)
    seen["deaths"] = tuple(pickle.loads(pickle.dumps(error)) for error in errors)


def generate_once(
    folder: Path, batches: list[list[GenerationRequest]], **changes: Any
) -> tuple[list[list[Completion]], int]:
    """What one generator writes to each batch, and the tokens it says it has read and written."""
    engine = tiny_engine()
    generator = engine.start_generator(engine_plan(engine, folder, role="generator", **changes), "generator-0")
    try:
        completions = [asyncio.run(generator.generate(requests, deadline_s=DEADLINE_S)) for requests in batches]
        return completions, generator.statistics().num_tokens
    finally:
        generator.close()


@dataclass(frozen=True)
class EngineCalls:
    """What calls of `EngineLoop.run` gave while requests were inside."""

    result: str
    engine_thread: str
    requests_inside: int
    equal_text: bool
    failure: str
    late: str
    late_call_ran: bool
    after_close: str


def run_in_engine(folder: Path, requests: list[GenerationRequest]) -> EngineCalls:
    """Call into an engine before, while and after it writes."""
    engine = tiny_engine()
    generator = engine.start_generator(engine_plan(engine, folder, role="generator"), "generator-0")
    loop, ran = generator.loop, []

    def fail(_: Any) -> None:
        raise RuntimeError("no weights")

    async def refusal(work: Any, *, name: str, deadline_s: float) -> str:
        try:
            await loop.run(work, name=name, deadline_s=deadline_s)
        except StillhouseError as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    async def main() -> EngineCalls:
        alone = await generator.generate(requests, deadline_s=DEADLINE_S)
        writing = asyncio.create_task(generator.generate(requests, deadline_s=DEADLINE_S))
        await asyncio.sleep(0)  # it is submitted
        inside = await loop.run(lambda engine: engine.get_num_unfinished_requests(), name="count", deadline_s=60)
        failure = await refusal(fail, name="weights of another shape", deadline_s=60)
        thread = await loop.run(lambda _: threading.current_thread().name, name="thread", deadline_s=60)
        beside = await writing
        slow = asyncio.create_task(loop.run(lambda _: time.sleep(0.5), name="slow", deadline_s=60))
        await asyncio.sleep(0.05)
        late = await refusal(lambda _: ran.append(1), name="late", deadline_s=0.05)
        await slow
        await loop.run(lambda _: None, name="nothing", deadline_s=60)
        generator.close()
        closed = await refusal(lambda _: None, name="closed", deadline_s=60)
        equal = all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(alone, beside, strict=True))
        return EngineCalls(thread, loop._thread.name, inside, equal, failure, late, bool(ran), closed)

    return asyncio.run(main())


def parse(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's own class makes of keyword arguments."""
    from vllm import EngineArgs

    parsed = EngineArgs(model=str(folder), **arguments)
    return {name: getattr(parsed, name) for name in arguments}


@dataclass(frozen=True)
class Beside:
    """What two engines of one process gave, both at work at once."""

    columns: list[dict[str, np.ndarray]]
    completions: list[list[Completion]]
    unshared: list[str]  # names of the scorer's weights that are not the generator's


def score_beside_writing(folder: Path, unit: Unit, spec: Labels, requests: list[GenerationRequest]) -> Beside:
    """A scorer and a generator in one process, asked together three times."""
    from cluster.engines.vllm import apply
    from cluster.teachers.actor import Engines

    engine = tiny_engine()
    generator = engine_plan(engine, folder, role="generator")
    engines = Engines.start(engine_plan(engine, folder, beside=generator), "scorer-0")

    async def ask() -> Any:
        return await asyncio.gather(
            engines.scorer.score(unit, spec, deadline_s=DEADLINE_S),
            engines.generator.generate(requests, deadline_s=DEADLINE_S),
        )

    try:
        weights = [
            {name: weight.data_ptr() for name, weight in apply(one.loop, lambda model: model).named_parameters()}
            for one in (engines.scorer, engines.generator)
        ]
        rounds = [asyncio.run(ask()) for _ in range(3)]
    finally:
        engines.close()
    return Beside(
        columns=[dict(block.columns) for (_, block), _ in rounds],
        completions=[completions for _, completions in rounds],
        unshared=[name for name, place in weights[0].items() if weights[1].get(name) != place],
    )
