"""`python -m benchmarks scoring`: what labelling a batch costs over vLLM's bare prefill of that very batch.

Three processes take turns on every batch: our scorer (cluster/engines/vllm.py) with each encoding; vLLM as it comes,
which reads the prompts and writes one token (`max_tokens=1`): that is the bare prefill, and 1.0 of the table; and the
arithmetic floor (`benchmarks/floor.py`). The bare prefill leaves the head out, but for the last row of each sequence.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.floor import FloorSetup, Shapes
from benchmarks.scoring_result import PREFILL, Measured, ScoringResult
from benchmarks.scoring_worker import Label, Prefill
from benchmarks.worker import Worker
from benchmarks.workload import Workload, corpus, make_run, make_student, write_rows
from cluster.engines.plan import LABEL_CHUNK_ROWS, EnginePlan
from cluster.placement.hardware import Hardware
from configs.labels import GivenIds, Hidden, Labels, Nucleus, Sampled, Token, TopK
from configs.models import ModelSource
from launch.resolving import resolve_run
from trainer.checks.label_check import some_ids
from trainer.data.vocabulary import load_tokenizer
from trainer.errors import ConfigError
from trainer.loop.inputs import read_inputs
from trainer.types import Sequence, Unit

STOCK = "vLLM's prompt_logprobs=64"
STOCK_SHARE = 4  # of the batch: a quarter says enough, and Python objects take long
TOPK, HIDDEN, GIVEN = TopK(k=64), Hidden(), GivenIds(k=64)
NUCLEUS, SAMPLED, TOKEN = Nucleus(), Sampled(), Token()


@dataclass(frozen=True, slots=True)
class Batch:
    sequences: int
    tokens: int  # of each

    @classmethod
    def parse(cls, text: str) -> Batch:
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None or int(match[1]) < 1 or int(match[2]) < 8:
            raise ConfigError(f"--batch: '{text}' is no batch; write sequences x tokens, at least 1x8, such as 32x256")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.sequences}x{self.tokens}"


WARM_UP = Batch(2, 64)


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    teacher: Path
    batches: tuple[Batch, ...]
    rounds: int
    dtype: str = "auto"


def scoring(plan: ScoringPlan, work: Path, *, note: Callable[[str], None]) -> ScoringResult:
    """Measure; `work` is an empty folder, and `note` is told what goes on."""
    longest = max(batch.tokens for batch in plan.batches)
    engine, reasons = engine_plan(plan.teacher, work, longest, dtype=plan.dtype)
    return asyncio.run(_measure(plan, engine, reasons, work, note))


def engine_plan(teacher: Path, work: Path, longest: int, *, dtype: str = "auto") -> tuple[EnginePlan, tuple[str, ...]]:
    """The scorer's plan as a real run would have it on this machine."""
    student, rows = work / "student", work / "rows.jsonl"
    workload = Workload(max_tokens=longest, scorer_dtype=dtype)
    make_student(teacher, student, seed=0)
    write_rows(rows, load_tokenizer(ModelSource(path=str(teacher))), Workload(), count=1)
    run = make_run(teacher, student, rows, work / "run", workload, labels="topk", steps=1)
    resolved = resolve_run(run, read_inputs(run), Hardware.local())
    return resolved.teachers[run.teacher.name].scorer, resolved.reasons


def _stock(plan: EnginePlan) -> EnginePlan:
    """vLLM's own generation engine with the same limits and nothing of ours; prefix caching stays off in both."""
    arguments = {key: value for key, value in plan.arguments.items() if key != "hf_overrides"}
    arguments |= {
        "runner": "generate",
        "max_logprobs": TOPK.k,
        "max_model_len": plan.max_length + 1,  # one token is written
        "skip_tokenizer_init": False,  # by default its log-probabilities come with text
    }
    return replace(plan, role="generator", arguments=arguments)


async def _measure(
    plan: ScoringPlan, engine: EnginePlan, reasons: tuple[str, ...], work: Path, note: Callable[[str], None]
) -> ScoringResult:
    async with AsyncExitStack() as stack:

        async def start(name: str, module: str, setup: object) -> Worker:
            note(f"starting {name}")
            environment = engine.environment
            worker = await Worker.start(module, setup, environment=environment, log=work / f"{name}.log")
            stack.push_async_callback(worker.close)
            return worker

        workers = {
            "scorer": await start("scorer", "benchmarks.scoring_worker", engine),
            "vllm": await start("vllm", "benchmarks.scoring_worker", _stock(engine)),
        }
        floor = await start("floor", "benchmarks.floor", _floor_setup(plan.teacher, engine))
        ids = token_stream(plan.teacher)
        note("warming up")
        for worker, question, _, _ in _ways(WARM_UP, ids, seed=0).values():
            await workers[worker].ask(question)
        measured, floors = [], []
        for number in range(plan.rounds):
            floors.append(await floor.ask(None))
            for batch in plan.batches:
                for way, (worker, question, tokens, rows) in _ways(batch, ids, seed=number + 1).items():
                    cost = await workers[worker].ask(question)
                    measured.append(Measured(way, str(batch), number, tokens, rows, cost))
                    each = 1000 * cost.cpu.total_s / tokens
                    note(f"round {number + 1}: {batch} {way}: {each:.3f} CPU-ms per token, {cost.wall_s:.1f} s")
        return ScoringResult(tuple(measured), tuple(floors), reasons)


def _floor_setup(teacher: Path, engine: EnginePlan) -> FloorSetup:
    """Products of as many rows as the engine's have."""
    tokens = engine.arguments["max_num_batched_tokens"]
    return FloorSetup(Shapes.of(teacher), None, engine.dtype, tokens=tokens, chunk_rows=LABEL_CHUNK_ROWS)


def token_stream(teacher: Path) -> np.ndarray:
    """The benchmark's text as int32 ids."""
    tokenizer = load_tokenizer(ModelSource(path=str(teacher)))
    text, _ = corpus(tokenizer)
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)


def _ways(batch: Batch, ids: np.ndarray, *, seed: int) -> Mapping[str, tuple[str, Label | Prefill, int, int]]:
    """What is asked of whom about one batch, how many tokens that is, and how many rows have their product with the
    head taken by us."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - batch.tokens, size=batch.sequences)
    texts = [ids[start : start + batch.tokens] for start in starts]
    all_rows, answer_rows = np.ones(batch.tokens, dtype=bool), np.ones(batch.tokens, dtype=bool)
    all_rows[-1] = answer_rows[-1] = False
    answer_rows[: batch.tokens // 3] = False
    tokens = batch.sequences * batch.tokens

    def label(rows: np.ndarray, encoding: Labels) -> tuple[str, Label | Prefill, int, int]:
        sequences = tuple(Sequence(f"{i}", text, rows, "dataset") for i, text in enumerate(texts))
        unit = Unit(id=f"{seed}", sequences=sequences)
        given = some_ids(unit, encoding.num_given, vocabulary_size=int(ids.max()) + 1) if encoding.takes_ids else None
        return "scorer", Label(unit, encoding, given), tokens, 0 if encoding == HIDDEN else unit.num_rows

    def prefill(count: int, prompt_logprobs: int | None) -> tuple[str, Label | Prefill, int, int]:
        prompts = tuple(tuple(text.tolist()) for text in texts[:count])
        rows = 0 if prompt_logprobs is None else count * (batch.tokens - 1)
        return "vllm", Prefill(prompts, prompt_logprobs), count * batch.tokens, rows

    return {
        PREFILL: prefill(batch.sequences, None),
        "hidden": label(all_rows, HIDDEN),
        "token": label(all_rows, TOKEN),
        "given_ids, 64 and the target": label(all_rows, GIVEN),
        "topk, 64": label(all_rows, TOPK),
        "topk, 64, answer rows (two thirds)": label(answer_rows, TOPK),
        "sampled, 50 draws": label(all_rows, SAMPLED),
        "nucleus, 0.98 of 256": label(all_rows, NUCLEUS),
        STOCK: prefill(max(1, batch.sequences // STOCK_SHARE), TOPK.k),
    }
