"""The supply loop: makes steps ready for training, ahead of the train loop and bounded by permits.

    permit -> source.take -> source.collect -> plan -> (ids) -> score units -> stage on ranks -> ready queue -> next()
       ^                                                                                                           |
       +--------------------------------- trained(step), after the optimizer step ---------------------------------+

A permit is taken before prompts are drawn and returned after the optimizer step. With depth d, d further steps may be
under way while one is trained; depth 0 is strictly synchronous. An error waits in the queue until its step is due.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from configs.section import MAIN
from trainer.align.share import AlignedShare, align_metrics
from trainer.loop.label_means import means_of_tasks
from trainer.loop.plan import cut_units, groups_of, plan_step
from trainer.loop.proposals import Proposals
from trainer.loop.rollout_checks import check_rollouts
from trainer.loop.scoring import Scored, UnitScorers, score_and_stage
from trainer.loop.settings import LoopSettings
from trainer.loop.together import names_of
from trainer.protocols import Observer, Students
from trainer.threads import in_thread, wrapped
from trainer.types import AnswerCounters, Cursor, RankBatch, RowIdsRef, Sequence, UnitReport

if TYPE_CHECKING:
    from trainer.loop.sources import Drawn, Source

_Made = TypeVar("_Made")
_Task = asyncio.Task["ReadyStep"] | asyncio.Task[None]
SETTLE_S = 5.0  # for rows that are being read when nobody needs them any more: a thread is better not left behind


@dataclass(frozen=True, slots=True)
class ReadyStep:
    """A step whose labels are staged on every rank."""

    step: int
    cursor: Cursor  # after its prompts: what a checkpoint taken after it must hold
    reports: tuple[UnitReport, ...]
    sequence_ids: tuple[str, ...]
    answers: AnswerCounters  # written for it
    answers_by_task: Mapping[str, AnswerCounters]
    parts: Mapping[str, float]  # metrics of tasks and teachers by name; empty where there is one of each


class Permits:
    """Steps admitted and not yet trained, bounded by number and by bytes of labels.

    The oldest admitted step always gets its bytes, whatever its size: a step over the cap runs alone, none deadlocks.
    """

    def __init__(self, *, depth: int, max_bytes: int) -> None:
        self._steps = asyncio.Semaphore(depth + 1)
        self._max_bytes = max_bytes
        self._bytes: dict[int, int] = {}
        self._oldest: list[int] = []
        self._changed = asyncio.Condition()

    async def admit(self, step: int) -> None:
        await self._steps.acquire()
        self._oldest.append(step)

    async def reserve(self, step: int, num_bytes: int) -> None:
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._oldest[0] == step or sum(self._bytes.values()) + num_bytes <= self._max_bytes
            )
            self._bytes[step] = num_bytes

    async def give_back(self, step: int) -> None:
        async with self._changed:
            self._oldest.remove(step)
            self._bytes.pop(step, None)
            self._changed.notify_all()
        self._steps.release()


class Supply:
    """Ready steps in their order. One attempt: a restarted student group gets a new one over the same source."""

    def __init__(
        self,
        source: Source,
        scorers: UnitScorers,
        students: Students,
        *,
        settings: LoopSettings,
        observer: Observer,
    ) -> None:
        self._source = source
        self._scorers = scorers
        self._students = students
        self._settings = settings
        self._observer = observer
        self.proposals = Proposals(students, scorers.takes_ids if scorers.any_takes_ids else None, observer)
        self._permits = Permits(depth=settings.depth, max_bytes=settings.max_label_bytes)
        self._ready: asyncio.Queue[_Task] = asyncio.Queue()
        self._supplying: list[_Task] = []  # the loop itself, then its steps that are not trained yet
        self._last_made = 0  # of the steps there is a task for
        self._taking: asyncio.Future[Drawn] | None = None  # in a thread: a disk may hang
        self._aligned = AlignedShare(settings.min_aligned)
        self._answers: dict[str, AnswerCounters] = {}  # of the steps taken here, by task

    def start(self, start_step: int) -> None:
        """Begin with the step after `start_step`; the source stands there."""
        supply = asyncio.create_task(_as_error(partial(self._run, start_step)), name="supply")
        supply.add_done_callback(self._ended)
        self._supplying.append(supply)

    async def next(self) -> ReadyStep:
        """The next step, its cursor with the answers of all steps up to it. Raises what kept it from becoming ready,
        and `DataError` where too many answers are of no use."""
        task = await self._ready.get()
        ready = await asyncio.shield(task)
        assert ready is not None, "the loop itself is queued with an error alone"
        self._supplying = [other for other in self._supplying if other is not task]
        return self._with_answers(ready)

    async def trained(self, step: int) -> None:
        """Its permit is free again."""
        await self._permits.give_back(step)

    async def end(self) -> None:
        """Cancel what is not trained yet; its errors concern nobody any more."""
        for task in self._supplying:
            task.cancel()
        await asyncio.gather(*self._supplying, return_exceptions=True)
        self._supplying.clear()
        if self._taking is not None:
            await asyncio.wait([self._taking], timeout=SETTLE_S)
        while not self._ready.empty():
            left = self._ready.get_nowait()
            if left.done() and not left.cancelled():
                left.exception()

    async def settle(self) -> None:
        """After `end`: wait until no thread reads the source, which may then be moved."""
        if self._taking is not None:
            await asyncio.wait([self._taking])

    async def _run(self, start_step: int) -> None:
        for step in range(start_step + 1, self._settings.total_steps + 1):
            await self._permits.admit(step)
            self._taking = asyncio.ensure_future(in_thread(self._source.take, step))
            drawn = await asyncio.shield(self._taking)
            task = asyncio.create_task(_as_error(partial(self._make_ready, drawn)), name=f"step-{step}")
            self._supplying.append(task)
            self._last_made = step
            self._ready.put_nowait(task)

    def _ended(self, supply: asyncio.Task[None]) -> None:
        """An error of the loop itself waits behind the steps that it made."""
        self.proposals.close(self._last_made)
        self._source.close(self._last_made)
        if not supply.cancelled() and supply.exception() is not None:
            self._ready.put_nowait(supply)

    async def _make_ready(self, drawn: Drawn) -> ReadyStep:
        try:
            return await self._plan_and_score(drawn)
        finally:
            self.proposals.nothing(drawn.step)  # more, after an error

    async def _plan_and_score(self, drawn: Drawn) -> ReadyStep:
        collected = await self._source.collect(drawn)
        sequences = collected.sequences
        check_rollouts(sequences, self._settings.learns_rewards)
        self._aligned.add(sequences)
        plan = plan_step(
            [sequence.num_tokens for sequence in sequences],
            world=self._students.world,
            token_budget=self._settings.micro_batch_tokens,
            groups=groups_of(sequences, compared=self._settings.compared) if self._settings.compared else None,
        )
        batches = cut_units(sequences, plan, step=drawn.step, units_per_rank=self._settings.units_per_rank)
        given = await self.proposals.of(batches)
        num_bytes = self._settings.label_bytes_per_row * sum(s.num_loss_tokens for s in sequences)
        await self._permits.reserve(drawn.step, num_bytes)
        scored = await self._score_and_stage(batches, given)
        reports = {name: one[0] for name, one in scored.items() if one is not None}
        of_labels = means_of_tasks(batches, reports) | align_metrics(sequences)
        return ReadyStep(
            step=drawn.step,
            cursor=drawn.cursor,
            reports=tuple(reports.values()),
            sequence_ids=tuple(sequence.id for sequence in sequences),
            answers=collected.answers,
            answers_by_task=collected.answers_by_task,
            parts=_parts(sequences) | _lost_rows(batches, scored) | of_labels | collected.numbers,
        )

    async def _score_and_stage(
        self, batches: tuple[RankBatch, ...], given: Mapping[str, RowIdsRef]
    ) -> dict[str, Scored | None]:
        """What was asked of teachers, by the id of the unit as each was asked about it. `given`: ids, by unit."""
        asked = [(one, unit) for batch in batches for unit in batch.units for one in self._scorers.asked(unit)]
        units, ids = [one for one, _ in asked], {one.id: given.get(unit.id) for one, unit in asked}
        scored: dict[str, Scored | None] = {}

        async def stage() -> None:
            left = [self._scorers.left(batch, scored) for batch in batches]
            asked = [[one.id for unit in batch.units for one in self._scorers.asked(unit)] for batch in left]
            started = time.time()
            await self._students.stage(left, [[scored[one][1] for one in of_rank] for of_rank in asked])
            self._observer.span("student", "stage", started, time.time(), f"step {batches[0].step}")

        await score_and_stage(
            f"step {batches[0].step}",
            units,
            scored,
            score=lambda unit: self._scorers.score(unit, ids[unit.id]),
            stage=stage,
            attempts=self._settings.max_unit_attempts,
            observer=self._observer,
        )
        return scored

    def _with_answers(self, ready: ReadyStep) -> ReadyStep:
        """Answers are counted in the order of the steps, whatever the order in which they were written."""
        before = ready.cursor.with_answers(self._answers).answers
        for name, more in ready.answers_by_task.items():
            self._answers[name] = self._answers.get(name, AnswerCounters()).plus(more)
        cursor = ready.cursor.with_answers(self._answers)
        answers = cursor.answers
        if answers.cut_off and not before.cut_off:
            text = f"step {ready.step} has answers that were not ended (answers.max_new_tokens)"
            self._observer.event("note", text=f"{text}; answers/cut_off in metrics.jsonl counts them")
        if answers.empty and not before.empty:
            text = f"step {ready.step} has prompts that were answered with nothing"
            self._observer.event("note", text=f"{text}; answers/empty in metrics.jsonl counts them")
        self._source.judge(cursor, last=ready.step == self._settings.total_steps)
        if not ready.sequence_ids:
            self._observer.event("empty_step", at_step=ready.step)
        return replace(ready, cursor=cursor)


def _parts(sequences: tuple[Sequence, ...]) -> dict[str, float]:
    """What of a step is of each task and of each teacher, where they have names."""
    parts: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for sequence in sequences:
        if sequence.task != MAIN:
            parts[f"task/{sequence.task}/sequences"] += 1
            parts[f"task/{sequence.task}/loss_tokens"] += sequence.num_loss_tokens
        for teacher in filter(None, names_of(sequence.teacher)):
            asked[teacher] += sequence.num_tokens
    tokens = {f"teacher/{name}/tokens": float(count) for name, count in asked.items()}
    shares = {f"teacher/{name}/token_share": count / asked.total() for name, count in asked.items()}
    return {**{name: float(count) for name, count in parts.items()}, **tokens, **shares}


def _lost_rows(batches: tuple[RankBatch, ...], scored: Mapping[str, Scored | None]) -> dict[str, float]:
    """Loss tokens that each teacher of an ensemble did not judge, because it is lost."""
    lost: Counter[str] = Counter()
    units = [unit for batch in batches for unit in batch.units if len(unit.asked()) > 1]
    for one in (one for unit in units for one in unit.asked()):
        lost[f"teacher/{one.kind[1]}/lost_rows"] += one.num_rows if scored[one.id] is None else 0
    return {name: float(count) for name, count in lost.items()}


async def _as_error(work: Callable[[], Awaitable[_Made]]) -> _Made:
    """What `work` returns or raises, always as an `Exception`: a plug-in or a library may raise what would end the
    loop or look like a request to stop (`sys.exit()`, a cancellation that nobody here asked for)."""
    try:
        return await work()
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as raised:
        task = asyncio.current_task()
        if isinstance(raised, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        raise wrapped(raised) from raised
