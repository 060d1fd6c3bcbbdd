"""`benchmarks distil`: CPU time per token of the pipeline, against the plain recipe, in turns on the same text.

    round:  topk, hidden,
            given_ids      `steps` steps of each pipeline, all its processes counted (pipeline.py)
            plain          the same steps of the plain recipe in one process, as anyone runs it (plain.py)
            plain tuned    the same with an allocator that keeps its memory
            floor          the arithmetic alone of what each side had to do (floor.py)

Sides take turns because machines drift; what is compared is the ratio within a round, medians over the rounds.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.distil_result import DistilResult
from benchmarks.floor import Floor, FloorSetup, Shapes
from benchmarks.pipeline import Daemons, Pipeline, Segment
from benchmarks.plain import TUNED_ALLOCATOR, PlainAnswer, PlainSetup, PlainSteps, Text
from benchmarks.worker import Worker
from benchmarks.workload import LEARNING_RATE, Workload, make_run, make_student, same_sequences, write_rows
from cluster.lifecycle import ray_session
from configs.models import ModelSource
from trainer.data.vocabulary import load_tokenizer
from trainer.types import Sequence as TokenSequence

PLAIN, PLAIN_TUNED = "plain", "plain tuned"
WARM_UP_STEPS = 5
OBJECT_STORE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class DistilPlan:
    """What is compared, how often."""

    teacher: Path
    labels: tuple[str, ...]
    steps: int  # of a segment
    rounds: int
    workload: Workload

    @property
    def total_steps(self) -> int:
        return WARM_UP_STEPS + self.steps * self.rounds


def distil(plan: DistilPlan, work: Path, *, note: Callable[[str], None]) -> DistilResult:
    """Measure; `work` is an empty folder, and `note` is told what goes on."""
    student, rows = work / "student", work / "rows.jsonl"
    make_student(plan.teacher, student, seed=plan.workload.seed)
    tokenizer = load_tokenizer(ModelSource(path=str(plan.teacher)))
    write_rows(rows, tokenizer, plan.workload, count=plan.total_steps * plan.workload.sequences_per_step)
    pipelines = [
        Pipeline(
            make_run(plan.teacher, student, rows, work / labels, plan.workload, labels=labels, steps=plan.total_steps)
        )
        for labels in plan.labels
    ]
    slots = sum(pipeline.resolved.placement.num_slots for pipeline in pipelines)
    note("starting Ray")
    cluster = ray_session.start_ray(num_cpus=slots, address="local", object_store_bytes=OBJECT_STORE_BYTES)
    try:
        return asyncio.run(_measure(plan, pipelines, Daemons(cluster, pipelines), work, note))
    finally:
        ray_session.stop_ray(cluster)


async def _measure(
    plan: DistilPlan, pipelines: list[Pipeline], daemons: Daemons, work: Path, note: Callable[[str], None]
) -> DistilResult:
    async with AsyncExitStack() as stack:
        for pipeline in pipelines:
            note(f"starting teacher and student ({pipeline.run.labels.kind} labels)")
            stack.push_async_callback(pipeline.close)
            await pipeline.start()
        note("starting the plain recipe")
        sequences = await asyncio.to_thread(same_sequences, pipelines[0].run, pipelines[0].inputs)
        plain = {
            name: PlainSide(name, await _plain_worker(pipelines[0], name, environment, work, stack), sequences, plan)
            for name, environment in ((PLAIN, {}), (PLAIN_TUNED, TUNED_ALLOCATOR))
        }
        floor = await _floor_worker(pipelines[0], sequences, plan, work, stack)
        note("warming up")
        for pipeline in pipelines:
            await pipeline.train(WARM_UP_STEPS, round=-1, daemons=daemons)
        for side in plain.values():
            await side.warm_up()
            note(f"{side.name}: threads: {side.threads} ({side.tried})")
        segments: list[Segment] = []
        floors: list[Floor] = []
        for number in range(plan.rounds):
            floors.append(await floor.ask(None))
            for pipeline in pipelines:
                segments.append(await pipeline.train(plan.steps, round=number, daemons=daemons))
                note(describe(segments[-1]))
            for side in plain.values():
                segments.append(await side.train(number))
                note(describe(segments[-1]))
        return DistilResult(
            segments=tuple(segments),
            floors=tuple(floors),
            plain_threads={side.name: side.threads for side in plain.values()},
            reasons=pipelines[0].resolved.reasons,
        )


async def _plain_worker(
    pipeline: Pipeline, name: str, environment: dict[str, str], work: Path, stack: AsyncExitStack
) -> Worker:
    setup = PlainSetup(
        teacher=Path(pipeline.run.teacher.model.path),
        student=Path(pipeline.run.student.model.path),
        dtype=pipeline.resolved.student.dtype,
        device_type=pipeline.resolved.student.device_type,
        learning_rate=LEARNING_RATE,
    )
    log = work / f"{name.replace(' ', '-')}.log"
    worker = await Worker.start("benchmarks.plain", setup, environment=environment, log=log)
    stack.push_async_callback(worker.close)
    return worker


async def _floor_worker(
    pipeline: Pipeline, sequences: Sequence[TokenSequence], plan: DistilPlan, work: Path, stack: AsyncExitStack
) -> Worker:
    tokens = sum(one.num_tokens for one in sequences) // plan.total_steps
    setup = FloorSetup(
        teacher=Shapes.of(Path(pipeline.run.teacher.model.path)),
        student=Shapes.of(Path(pipeline.run.student.model.path)),
        dtype=pipeline.resolved.student.dtype,
        tokens=-(-tokens // 32) * 32,
        chunk_rows=pipeline.run.student.loss_chunk_rows,
    )
    environment = {"OMP_NUM_THREADS": "1", **TUNED_ALLOCATOR}
    worker = await Worker.start("benchmarks.floor", setup, environment=environment, log=work / "floor.log")
    stack.push_async_callback(worker.close)
    return worker


class PlainSide:
    """The plain recipe on the same steps as the pipelines."""

    def __init__(self, name: str, worker: Worker, sequences: Sequence[TokenSequence], plan: DistilPlan) -> None:
        self.name = name
        self.threads = 1
        self.tried = ""
        self._worker = worker
        self._sequences = sequences
        self._plan = plan

    async def warm_up(self) -> None:
        """The pipelines' warm-up steps, each once; by the way, how many threads are cheaper."""
        await self._ask(1, 1, threads=1)
        cost = {}
        for threads, first, last in ((1, 2, 3), (2, 4, WARM_UP_STEPS)):
            threads = min(threads, len(os.sched_getaffinity(0)))
            tokens = sum(text.num_tokens for text in self._texts(first, last))
            cpu = (await self._ask(first, last, threads=threads)).cpu
            cost[threads] = 1000 * cpu.total_s / tokens
        self.threads = min(cost, key=cost.__getitem__)
        self.tried = ", ".join(f"{each:.2f} CPU-ms per token with {threads}" for threads, each in cost.items())

    async def train(self, round: int) -> Segment:
        """The steps of one round."""
        first = WARM_UP_STEPS + round * self._plan.steps + 1
        last = first + self._plan.steps - 1
        started = time.monotonic()
        answer = await self._ask(first, last, threads=self.threads)
        texts = self._texts(first, last)
        return Segment(
            side=self.name,
            round=round,
            cpu={"process": answer.cpu},
            steps=self._plan.steps,
            tokens=sum(text.num_tokens for text in texts),
            loss_tokens=sum(text.num_loss_tokens for text in texts),
            wall_s=time.monotonic() - started,
            loss=sum(answer.losses) / len(answer.losses),
        )

    async def _ask(self, first: int, last: int, *, threads: int) -> PlainAnswer:
        texts = [Text(text.token_ids, text.loss_mask) for text in self._texts(first, last)]
        size = self._plan.workload.sequences_per_step
        batches = tuple(tuple(texts[start : start + size]) for start in range(0, len(texts), size))
        return await self._worker.ask(PlainSteps(batches, threads))

    def _texts(self, first: int, last: int) -> Sequence[TokenSequence]:
        size = self._plan.workload.sequences_per_step
        return self._sequences[(first - 1) * size : last * size]


def describe(segment: Segment) -> str:
    """One line of a segment, while it is measured."""
    cpu = sum(time.total_s for time in segment.cpu.values())
    parts = ", ".join(f"{part} {time.total_s:.1f}" for part, time in segment.cpu.items())
    return (
        f"round {segment.round + 1}: {segment.side}: {1000 * cpu / segment.tokens:.2f} CPU-ms per token "
        f"({segment.tokens} tokens, {segment.wall_s:.0f} s; CPU-s: {parts}; loss {segment.loss:.3f})"
    )
