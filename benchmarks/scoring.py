"""`python -m benchmarks scoring`: what labelling a batch costs over vLLM's bare prefill of that very batch.

Two processes take turns on every batch: our scorer (cluster/engines/vllm.py) with each encoding, and vLLM as it comes,
which reads the prompts and writes one token (`max_tokens=1`): that is the bare prefill, and 1.0 of the table.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.scoring_worker import Cost, Label, Prefill
from benchmarks.worker import Worker
from benchmarks.workload import Workload, corpus, make_run, make_student, write_rows
from cluster.engines.plan import EnginePlan
from cluster.placement.hardware import Hardware
from configs.labels import GivenIds, Hidden, Labels, Nucleus, Sampled, TopK
from configs.models import ModelSource
from launch.resolving import resolve_run
from trainer.checks.label_check import some_ids
from trainer.data.vocabulary import load_tokenizer
from trainer.errors import ConfigError
from trainer.loop.inputs import read_inputs
from trainer.types import Sequence, Unit

PREFILL = "bare prefill"
STOCK = "vLLM's prompt_logprobs=64"
STOCK_SHARE = 4  # of the batch: a quarter says enough, and Python objects take long
TOPK, HIDDEN, GIVEN = TopK(k=64), Hidden(), GivenIds(k=64)
NUCLEUS, SAMPLED = Nucleus(), Sampled()


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


@dataclass(frozen=True, slots=True)
class Measured:
    """One way of reading one batch, once."""

    way: str
    batch: str
    round: int
    tokens: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class ScoringResult:
    measured: tuple[Measured, ...]
    reasons: tuple[str, ...]

    def per_token_ms(self, way: str, batch: str) -> list[float]:
        """CPU-milliseconds, by round."""
        return [1000 * m.cost.cpu.total_s / m.tokens for m in self._of(way, batch)]

    def ratios(self, way: str, batch: str) -> list[float]:
        """To the bare prefill of the same batch in the same round."""
        pairs = zip(self.per_token_ms(way, batch), self.per_token_ms(PREFILL, batch), strict=True)
        return [mine / bare for mine, bare in pairs]

    def bytes_per_token(self, way: str, batch: str) -> float:
        found = self._of(way, batch)
        return sum(m.cost.num_bytes for m in found) / sum(m.tokens for m in found)

    def _of(self, way: str, batch: str) -> list[Measured]:
        return [m for m in self.measured if (m.way, m.batch) == (way, batch)]

    @property
    def _rows(self) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys((m.batch, m.way) for m in self.measured))

    def to_json(self) -> dict[str, Any]:
        summary = [
            {
                "batch": batch,
                "way": way,
                "ratio": median(self.ratios(way, batch)),
                "ratios": self.ratios(way, batch),
                "cpu_ms_per_token": median(self.per_token_ms(way, batch)),
                "label_bytes_per_token": self.bytes_per_token(way, batch),
            }
            for batch, way in self._rows
        ]
        measured = [asdict(m) for m in self.measured]
        return {"summary": summary, "reasons": list(self.reasons), "measured": measured}

    def table(self) -> Table:
        table = Table(title="CPU time of a batch over that of its bare prefill; median of the rounds (least-most)")
        table.add_column("batch")
        table.add_column("way")
        for column in ("ratio", "CPU-ms per token", "label bytes per token"):
            table.add_column(column, justify="right")
        for batch, way in self._rows:
            ratios, cost = self.ratios(way, batch), self.per_token_ms(way, batch)
            label_bytes = self.bytes_per_token(way, batch)
            table.add_row(
                batch,
                way,
                f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                f"{median(cost):.3f}",
                f"{label_bytes:.0f}" if label_bytes else "",
            )
        return table


def scoring(plan: ScoringPlan, work: Path, *, note: Callable[[str], None]) -> ScoringResult:
    """Measure; `work` is an empty folder, and `note` is told what goes on."""
    longest = max(batch.tokens for batch in plan.batches)
    engine, reasons = engine_plan(plan.teacher, work, longest)
    return asyncio.run(_measure(plan, engine, reasons, work, note))


def engine_plan(teacher: Path, work: Path, longest: int) -> tuple[EnginePlan, tuple[str, ...]]:
    """The scorer's plan as a real run would have it on this machine."""
    student, rows, workload = work / "student", work / "rows.jsonl", Workload(max_tokens=longest)
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
        workers = {}
        for name, role_plan in (("scorer", engine), ("vllm", _stock(engine))):
            note(f"starting {name}")
            log = work / f"{name}.log"
            workers[name] = await Worker.start(
                "benchmarks.scoring_worker", role_plan, environment=role_plan.environment, log=log
            )
            stack.push_async_callback(workers[name].close)
        ids = token_stream(plan.teacher)
        note("warming up")
        for worker, question, _ in _ways(WARM_UP, ids, seed=0).values():
            await workers[worker].ask(question)
        measured = []
        for number in range(plan.rounds):
            for batch in plan.batches:
                for way, (worker, question, tokens) in _ways(batch, ids, seed=number + 1).items():
                    cost = await workers[worker].ask(question)
                    measured.append(Measured(way, str(batch), number, tokens, cost))
                    each = 1000 * cost.cpu.total_s / tokens
                    note(f"round {number + 1}: {batch} {way}: {each:.3f} CPU-ms per token, {cost.wall_s:.1f} s")
        return ScoringResult(tuple(measured), reasons)


def token_stream(teacher: Path) -> np.ndarray:
    """The benchmark's text as int32 ids."""
    tokenizer = load_tokenizer(ModelSource(path=str(teacher)))
    text, _ = corpus(tokenizer)
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)


def _ways(batch: Batch, ids: np.ndarray, *, seed: int) -> Mapping[str, tuple[str, Label | Prefill, int]]:
    """What is asked of whom about one batch, and how many tokens that is."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - batch.tokens, size=batch.sequences)
    texts = [ids[start : start + batch.tokens] for start in starts]
    all_rows, answer_rows = np.ones(batch.tokens, dtype=bool), np.ones(batch.tokens, dtype=bool)
    all_rows[-1] = answer_rows[-1] = False
    answer_rows[: batch.tokens // 3] = False
    last_row = np.zeros(batch.tokens, dtype=bool)
    last_row[-2] = True

    def label(rows: np.ndarray, encoding: Labels) -> tuple[str, Label | Prefill, int]:
        sequences = tuple(Sequence(f"{i}", text, rows, "dataset") for i, text in enumerate(texts))
        unit = Unit(id=f"{seed}", sequences=sequences)
        given = some_ids(unit, encoding.num_given, vocabulary_size=int(ids.max()) + 1) if encoding.takes_ids else None
        return "scorer", Label(unit, encoding, given), batch.sequences * batch.tokens

    def prefill(count: int, prompt_logprobs: int | None) -> tuple[str, Label | Prefill, int]:
        prompts = tuple(tuple(text.tolist()) for text in texts[:count])
        return "vllm", Prefill(prompts, prompt_logprobs), count * batch.tokens

    return {
        PREFILL: prefill(batch.sequences, None),
        "hidden, last row only": label(last_row, HIDDEN),
        "hidden, all rows": label(all_rows, HIDDEN),
        "top-64, all rows": label(all_rows, TOPK),
        "64 given ids and the target, all rows": label(all_rows, GIVEN),
        "top-64, answer rows (two thirds)": label(answer_rows, TOPK),
        "nucleus, all rows": label(all_rows, NUCLEUS),
        "sampled, all rows": label(all_rows, SAMPLED),
        STOCK: prefill(max(1, batch.sequences // STOCK_SHARE), TOPK.k),
    }
