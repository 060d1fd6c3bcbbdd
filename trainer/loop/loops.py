"""The two loops of a run and the bounded queue between them: one asyncio program over the protocols, no Ray, no vLLM.

    supply                                                          train
    ------                                                          -----
    consumes    prompts of the stream                               steps that are ready, in order
    per step    collect -> plan -> score units -> stage on ranks    step on all ranks -> metrics, evaluation, checkpoint
    waits for   a permit (depth, label bytes)                       the next step being ready
    unblocked   by the optimizer step that returns a permit         by the last `stage` answer of that step

A permit is taken before `collect` and returned after the optimizer step. With depth d, d further steps may be under way
while one is trained; depth 0 is strictly synchronous. Nothing else synchronises the loops.

An error of supply waits in the queue until its step is due: the steps before it are trained and saved.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from configs.labels import Labels
from trainer.errors import Diverged, InfrastructureError, LabelsLost, Preempted, StudentsLost
from trainer.loop.plan import cut_units, plan_step
from trainer.protocols import Elicitation, Scorers, Students
from trainer.threads import in_thread, wrapped
from trainer.types import (
    AnswerCounters,
    BlockRef,
    Cursor,
    Evaluation,
    Prompt,
    RankBatch,
    StepMetrics,
    Unit,
    UnitReport,
)

if TYPE_CHECKING:
    from trainer.data.prompts import PromptStream


_Made = TypeVar("_Made")
SETTLE_S = 5.0  # for rows that are being read when nobody needs them any more: a thread is better not left behind


class Observer(Protocol):
    """Who watches a run: metrics, progress, timeline. Must not raise and must not block for long. What a resumed run
    reports a second time (an evaluation) is the same as the first time."""

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...

    def span(self, lane: str, kind: str, start_s: float, stop_s: float, label: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What the loops need to know of a run's configuration."""

    total_steps: int
    sequences_per_step: int
    micro_batch_tokens: int
    depth: int
    max_label_bytes: int
    label_bytes_per_row: int
    units_per_rank: int
    max_unit_attempts: int
    evaluate_every: int
    save_every: int
    max_non_finite_steps: int
    save_every_s: float = 0.0  # since the last attempt to save; 0: by steps alone
    has_held_out_rows: bool = True  # False: there is nothing to evaluate on, also not after the last step


@dataclass(frozen=True, slots=True)
class ReadyStep:
    """A step whose labels are staged on every rank."""

    step: int
    cursor: Cursor  # after its prompts: what a checkpoint taken after it must hold
    reports: tuple[UnitReport, ...]
    prompt_ids: tuple[str, ...]
    num_sequences: int
    answers: AnswerCounters  # written for it


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


class Loops:
    """One attempt at the steps `start_step .. total_steps`; a restarted student group gets a new one."""

    def __init__(
        self,
        *,
        stream: PromptStream,
        elicitation: Elicitation,
        scorers: Scorers,
        students: Students,
        encoding: Labels,
        settings: LoopSettings,
        observer: Observer,
        save: Callable[[int, Cursor, int], Awaitable[bool]],
        stop_requested: asyncio.Event,
        non_finite_steps: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`save(step, cursor, non_finite_steps)` writes a checkpoint and returns whether there is one now."""
        self._stream = stream
        self._elicitation = elicitation
        self._scorers = scorers
        self._students = students
        self._encoding = encoding
        self._settings = settings
        self._observer = observer
        self._save = save
        self._stop_requested = stop_requested
        self._permits = Permits(depth=settings.depth, max_bytes=settings.max_label_bytes)
        self._ready: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
        self._supplying: list[asyncio.Task[Any]] = []  # the loop itself, then its steps that are not trained yet
        self._taking: asyncio.Future[list[Prompt]] | None = None  # from the stream, in a thread: a disk may hang
        self.non_finite_steps = non_finite_steps
        self.last_step = self._start_step = 0
        self.last_saved: int | None = None
        self._clock = clock
        self._saved_at = clock()
        self.last_evaluation: Evaluation | None = None
        self._cursor: Cursor | None = None  # after the last step trained here
        self._answers = AnswerCounters()  # of the steps taken here

    async def run(self, start_step: int) -> None:
        """Train to the last step. Raises the first error of the steps in their order; supply is then cancelled.

        `Preempted` after a requested stop; that, and an error of supply, comes after a checkpoint of what was trained.
        """
        self.last_step = self._start_step = start_step
        supply = asyncio.create_task(_as_error(self._supply, start_step), name="supply")
        supply.add_done_callback(self._supply_ended)
        self._supplying.append(supply)
        try:
            if 0 < start_step < self._settings.total_steps and self._to_be_evaluated(start_step):
                await self._evaluate(start_step)  # a run that is killed after a checkpoint may not have come to it
            await self._train(start_step)
        except StudentsLost:
            await self._end_supply()
            if self._taking is not None:
                await asyncio.wait([self._taking])  # the stream is moved next, and nobody may be reading it then
            raise
        finally:
            await self._end_supply()

    async def _supply(self, start_step: int) -> None:
        for step in range(start_step + 1, self._settings.total_steps + 1):
            await self._permits.admit(step)
            self._taking = asyncio.ensure_future(in_thread(self._stream.take, self._settings.sequences_per_step))
            prompts = await asyncio.shield(self._taking)
            making = _as_error(self._make_ready, step, prompts, self._stream.cursor)
            task = asyncio.create_task(making, name=f"step-{step}")
            self._supplying.append(task)
            self._ready.put_nowait(task)

    def _supply_ended(self, supply: asyncio.Task[None]) -> None:
        """Whatever ends it badly waits behind the steps that it made: nobody would ever hear of it otherwise."""
        if not supply.cancelled() and supply.exception() is not None:
            self._ready.put_nowait(supply)

    async def _end_supply(self) -> None:
        """Cancel what is not trained yet; its errors are nobody's any more."""
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

    async def _make_ready(self, step: int, prompts: list[Prompt], cursor: Cursor) -> ReadyStep:
        collected = await self._elicitation.collect(prompts)
        sequences = collected.sequences
        plan = plan_step(
            [sequence.num_tokens for sequence in sequences],
            world=self._students.world,
            token_budget=self._settings.micro_batch_tokens,
        )
        batches = cut_units(sequences, plan, step=step, units_per_rank=self._settings.units_per_rank)
        num_bytes = self._settings.label_bytes_per_row * sum(s.num_loss_tokens for s in sequences)
        await self._permits.reserve(step, num_bytes)
        reports = await self._score_and_stage(batches)
        return ReadyStep(
            step=step,
            cursor=cursor,
            reports=reports,
            prompt_ids=tuple(sequence.id for sequence in sequences),
            num_sequences=len(sequences),
            answers=collected.answers,
        )

    async def _score_and_stage(self, batches: tuple[RankBatch, ...]) -> tuple[UnitReport, ...]:
        """Score all units at once, then stage. Blocks that were lost on the way are scored again."""
        scored: dict[str, tuple[UnitReport, BlockRef]] = {}
        for attempt in range(self._settings.max_unit_attempts):
            missing = [unit for batch in batches for unit in batch.units if unit.id not in scored]
            scored.update(await self._score(missing))
            blocks = [[scored[unit.id][1] for unit in batch.units] for batch in batches]
            started = time.time()
            try:
                await self._students.stage(batches, blocks)
            except LabelsLost as lost:
                self._observer.event("labels_lost", units=list(lost.unit_ids), attempt=attempt)
                for unit_id in lost.unit_ids:
                    del scored[unit_id]
                continue
            self._observer.span("student", "stage", started, time.time(), f"step {batches[0].step}")
            return tuple(report for report, _ in scored.values())
        raise InfrastructureError(f"the labels of step {batches[0].step} were lost {attempt + 1} times in a row")

    async def _score(self, units: list[Unit]) -> dict[str, tuple[UnitReport, BlockRef]]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    unit.id: group.create_task(self._scorers.score(unit, self._encoding), name=f"unit {unit.id}")
                    for unit in units
                }
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        return {unit_id: task.result() for unit_id, task in tasks.items()}

    async def _train(self, start_step: int) -> None:
        for step in range(start_step + 1, self._settings.total_steps + 1):
            waited_from = time.time()
            try:
                ready = self._with_answers(await self._next_ready())
            except StudentsLost:
                raise
            except Exception as error:
                await self._save_before(error)
                raise
            if ready is None:
                await self._end_supply()
                await self._stop_early()
            trained_from = time.time()
            self._observer.span("student", "wait", waited_from, trained_from, f"step {step}")
            metrics = await self._students.step(step)
            await self._permits.give_back(step)
            self.last_step, self._cursor = step, ready.cursor
            self._observe(metrics, ready, waited_from, trained_from)
            self._count_non_finite(metrics, ready)
            await self._between_steps(step)

    def _with_answers(self, ready: ReadyStep | None) -> ReadyStep | None:
        """The step, its cursor with the answers of all steps up to it: they are counted as steps are trained, whatever
        the order in which they were written. Raises `DataError` where too many of them are of no use."""
        if ready is None:
            return None
        before = ready.cursor.answers.plus(self._answers)
        self._answers = self._answers.plus(ready.answers)
        answers = ready.cursor.answers.plus(self._answers)
        if answers.cut_off and not before.cut_off:
            text = f"step {ready.step} has answers that the teacher did not end (answers.max_new_tokens)"
            self._observer.event("note", text=f"{text}; answers/cut_off in metrics.jsonl counts them")
        if answers.empty and not before.empty:
            text = f"step {ready.step} has prompts that the teacher answered with nothing"
            self._observer.event("note", text=f"{text}; answers/empty in metrics.jsonl counts them")
        self._elicitation.judge(answers, last=ready.step == self._settings.total_steps)
        if not ready.num_sequences:
            self._observer.event("empty_step", at_step=ready.step)
        return replace(ready, cursor=replace(ready.cursor, answers=answers))

    async def _next_ready(self) -> ReadyStep | None:
        """The next step, or None as soon as a stop is requested while it is not being trained."""
        stop = asyncio.ensure_future(self._stop_requested.wait())
        ready = asyncio.ensure_future(self._take_ready())
        try:
            await asyncio.wait({stop, ready}, return_when=asyncio.FIRST_COMPLETED)
            return None if stop.done() else ready.result()
        finally:
            stop.cancel()
            ready.cancel()

    async def _take_ready(self) -> ReadyStep:
        task = await self._ready.get()
        ready = await asyncio.shield(task)
        self._supplying = [other for other in self._supplying if other is not task]
        return ready

    async def _stop_early(self) -> NoReturn:
        if not await self._save_what_was_trained():
            raise InfrastructureError(
                f"asked to stop after step {self.last_step}, whose checkpoint could not be written: run the same "
                "command again to go on from the one before it"
            )
        raise Preempted(f"stopped after step {self.last_step}; run the same command again to go on")

    async def _save_before(self, error: Exception) -> None:
        """Keep what was trained before the run ends with an error of supply, which is told, come what may."""
        try:
            await self._save_what_was_trained()
        except StudentsLost:
            raise
        except InfrastructureError as failed:
            self._observer.event("note", text=f"{failed}; what ends the run is another error: {type(error).__name__}")

    async def _save_what_was_trained(self) -> bool:
        """Whether there is nothing left to save."""
        if self._cursor is None or self.last_saved == self.last_step:
            return True
        await self._checkpoint(self.last_step)
        return self.last_saved == self.last_step

    def _observe(self, metrics: StepMetrics, ready: ReadyStep, waited_from: float, trained_from: float) -> None:
        now = time.time()
        self._observer.span("student", "train", trained_from, now, f"step {metrics.step}")
        rows = sum(report.num_rows for report in ready.reports)
        values = {
            **metrics.values,
            "student/wait_s": trained_from - waited_from,
            "student/step_s": now - trained_from,
            "step/seconds": now - waited_from,
            "step/sequences": ready.num_sequences,
            "labels/rows": rows,
            "labels/bytes": sum(report.num_bytes for report in ready.reports),
            "labels/mass": sum(r.mean_mass * r.num_rows for r in ready.reports) / rows if rows else math.nan,
            "scorer/score_s": sum(report.score_s for report in ready.reports),
        }
        if ready.answers.written:
            counters = asdict(ready.answers)
            values |= {f"answers/{name}": float(count) for name, count in counters.items()}
        self._observer.step(StepMetrics(step=metrics.step, values=values))

    def _count_non_finite(self, metrics: StepMetrics, ready: ReadyStep) -> None:
        if not metrics.values["train/skipped"]:
            return
        self.non_finite_steps += 1
        self._observer.event("non_finite_step", at_step=metrics.step, prompts=list(ready.prompt_ids))
        all_of_them = self.non_finite_steps == metrics.step == self._settings.total_steps
        if self.non_finite_steps > self._settings.max_non_finite_steps or all_of_them:
            raise Diverged(
                f"{self.non_finite_steps} steps had a non-finite loss or gradient (training.max_non_finite_steps: "
                f"{self._settings.max_non_finite_steps}), the last one step {metrics.step}; lower "
                "optimizer.learning_rate or look at the prompts listed in metrics.jsonl. The last checkpoint is kept."
            )

    async def _between_steps(self, step: int) -> None:
        last = step == self._settings.total_steps
        if self._to_be_evaluated(step):
            await self._evaluate(step)  # first: what it finds broken must not be saved
        if last or _due(step, self._settings.save_every) or self._is_old(self._clock() - self._saved_at):
            await self._checkpoint(step)

    def _is_old(self, seconds: float) -> bool:
        return 0 < self._settings.save_every_s <= seconds

    def _to_be_evaluated(self, step: int) -> bool:
        last = step == self._settings.total_steps
        return self._settings.has_held_out_rows and (last or _due(step, self._settings.evaluate_every))

    async def _checkpoint(self, step: int) -> None:
        started = time.time()
        if await self._save(step, self._cursor, self.non_finite_steps):
            self.last_saved = step
        self._saved_at = self._clock()  # after a failure too: three in a row end the run, and a disk needs time
        self._observer.span("student", "save", started, time.time(), f"step {step}")

    async def _evaluate(self, step: int) -> None:
        started = time.time()
        evaluation = await self._students.evaluate(step)
        self._observer.span("student", "evaluate", started, time.time(), f"step {step}")
        self._observer.evaluation(evaluation)
        self.last_evaluation = evaluation
        if not math.isfinite(evaluation.forward_kl):
            raise diverged(
                evaluation, last_good=self.last_saved or (self._start_step if step > self._start_step else 0)
            )


def diverged(evaluation: Evaluation, *, last_good: int) -> Diverged:
    """For an evaluation that is not finite. `last_good`: step of the last checkpoint before it; 0: there is none."""
    kept = f"The last good checkpoint is that of step {last_good}: training.steps: {last_good} exports its student"
    return Diverged(
        f"the held-out KL after step {evaluation.step} is {evaluation.forward_kl}: the student is broken, and nothing "
        "of it is exported. Lower optimizer.learning_rate, in a run of another name. "
        + (kept if last_good else "There is no good checkpoint before it")
    )


async def _as_error(work: Callable[..., Awaitable[_Made]], *arguments: Any) -> _Made:
    """What `work` answers, or why not, always as an `Exception`: a plug-in or a library may raise what would end the
    loop or look like a request to stop (`sys.exit()`, a cancellation that nobody here asked for)."""
    try:
        return await work(*arguments)
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as raised:
        task = asyncio.current_task()
        if isinstance(raised, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        raise wrapped(raised) from raised


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The error that a person should see: the first that is no cancellation, from the innermost group."""
    for error in group.exceptions:
        found = first_error(error) if isinstance(error, BaseExceptionGroup) else error
        if not isinstance(found, asyncio.CancelledError):
            return found
    return group.exceptions[0]
