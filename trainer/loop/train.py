"""The two loops of a run and the bounded queue between them: one asyncio program over the protocols, no Ray, no vLLM.

    supply (supply.py)                                              train (here)
    ------                                                          -----
    consumes    prompts of the source                               steps that are ready, in order
    per step    collect -> plan -> score units -> stage on ranks    (ids) -> step on all ranks -> metrics, hooks
    waits for   a permit (depth, label bytes)                       the next step being ready
    unblocked   by the optimizer step that returns a permit         by the last `stage` answer of that step

Where labels are of ids that the student chooses (proposals.py), it does so between two steps, and only then are the
units scored. Nothing else synchronises the loops. An error of supply waits until its step is due: the steps before it
are trained and saved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

from trainer.errors import Diverged, InfrastructureError, Preempted, StudentsLost
from trainer.loop.label_means import label_means
from trainer.loop.settings import LoopSettings
from trainer.protocols import Hook, Observer, Students
from trainer.types import StepMetrics, Trained

if TYPE_CHECKING:
    from trainer.loop.supply import ReadyStep, Supply

_Made = TypeVar("_Made")


class Loops:
    """One attempt at the steps `start_step .. total_steps`; a restarted student group gets a new one."""

    def __init__(
        self,
        supply: Supply,
        students: Students,
        hooks: AbstractSequence[Hook],
        *,
        settings: LoopSettings,
        observer: Observer,
        stop_requested: asyncio.Event,
        non_finite_steps: int = 0,
    ) -> None:
        self._supply = supply
        self._students = students
        self._hooks = hooks
        self._settings = settings
        self._observer = observer
        self._stop_requested = stop_requested
        self._non_finite_steps = non_finite_steps
        self._clock = time.monotonic
        self._ran_at = [0.0] * len(hooks)
        self._trained: Trained | None = None  # here
        self._chosen = 0  # the last step that ids were chosen for
        self.last_step = 0

    async def run(self, start_step: int) -> None:
        """Train to the last step. Raises the first error of the steps in their order; supply is then cancelled.

        `Preempted` after a requested stop; that, and an error of supply, comes after the hooks have kept what was
        trained.
        """
        self.last_step = self._chosen = start_step
        self._ran_at = [self._clock()] * len(self._hooks)
        self._supply.start(start_step)
        try:
            for hook in self._hooks:
                await hook.begin(start_step)
            await self._train(start_step)
        except StudentsLost:
            await self._supply.end()
            await self._supply.settle()
            raise
        finally:
            await self._supply.end()

    async def _train(self, start_step: int) -> None:
        for step in range(start_step + 1, self._settings.total_steps + 1):
            waited_from = time.time()
            try:
                ready, ids_s = await self._next_ready(step)
            except StudentsLost:
                raise
            except Exception as error:
                await self._finish_before(error)
                raise
            if ready is None:
                await self._supply.end()
                await self._stop_early()
            trained_from = time.time()
            self._observer.span("student", "wait", waited_from, trained_from, f"step {step}")
            metrics = await self._students.step(step)
            await self._supply.trained(step)
            now = time.time()
            self._observer.span("student", "train", trained_from, now, f"step {step}")
            times = StepTimes(wait_s=trained_from - waited_from - ids_s, ids_s=ids_s, step_s=now - trained_from)
            told = {name: value for hook in self._hooks for name, value in hook.told().items()}
            self._observer.step(_with_supply(metrics, ready, times, told))
            await self._run_hooks(self._note_trained(metrics, ready))

    async def _next_ready(self, step: int) -> tuple[ReadyStep | None, float]:
        """The next step, or None as soon as a stop is requested while it is not being trained; and seconds in which
        the students chose ids, for this step and for those that are due to be chosen for before it is trained."""
        ids_s = 0.0
        last = min(step + self._settings.ids_lag, self._settings.total_steps)
        for ahead in range(self._chosen + 1, last + 1):
            if not await self._unless_stopped(self._supply.proposals.planned(ahead)):
                return None, ids_s
            ids_s += await self._supply.proposals.choose(ahead)  # never given up: ranks do one thing at a time
            self._chosen = ahead
        ready = await self._unless_stopped(self._supply.next())
        return ready[0] if ready else None, ids_s

    async def _unless_stopped(self, work: Awaitable[_Made]) -> tuple[_Made] | None:
        """What `work` gives, or None as soon as a stop is requested."""
        stop = asyncio.ensure_future(self._stop_requested.wait())
        made = asyncio.ensure_future(work)
        try:
            await asyncio.wait({stop, made}, return_when=asyncio.FIRST_COMPLETED)
            return None if stop.done() else (made.result(),)
        finally:
            stop.cancel()
            made.cancel()

    async def _stop_early(self) -> NoReturn:
        if not await self._finish():
            raise InfrastructureError(
                f"asked to stop after step {self.last_step}, whose checkpoint could not be written: run the same "
                "command again to go on from the one before it"
            )
        raise Preempted(f"stopped after step {self.last_step}; run the same command again to go on")

    async def _finish_before(self, error: Exception) -> None:
        """Keep what was trained before the run ends with an error of supply, which is raised whatever happens here."""
        try:
            await self._finish()
        except StudentsLost:
            raise
        except InfrastructureError as failed:
            self._observer.event("note", text=f"{failed}; what ends the run is another error: {type(error).__name__}")

    async def _finish(self) -> bool:
        """Whether the hooks have kept all that was trained here."""
        trained = self._trained
        return trained is None or all([await hook.finish(trained) for hook in self._hooks])

    def _note_trained(self, metrics: StepMetrics, ready: ReadyStep) -> Trained:
        """Raises `Diverged` where too many steps were skipped."""
        step, total = metrics.step, self._settings.total_steps
        skipped = bool(metrics.values["train/skipped"])
        self._non_finite_steps += skipped
        self.last_step = step
        self._trained = Trained(step, ready.cursor, self._non_finite_steps, last=step == total)
        if not skipped:
            return self._trained
        self._observer.event("non_finite_step", at_step=step, prompts=list(ready.sequence_ids))
        all_of_them = self._non_finite_steps == step == total
        if self._non_finite_steps > self._settings.max_non_finite_steps or all_of_them:
            raise Diverged(
                f"{self._non_finite_steps} steps had a non-finite loss or gradient (training.max_non_finite_steps: "
                f"{self._settings.max_non_finite_steps}), the last one step {step}; lower optimizer.learning_rate or "
                "look at the prompts listed in metrics.jsonl. The last checkpoint is kept."
            )
        return self._trained

    async def _run_hooks(self, trained: Trained) -> None:
        for index, hook in enumerate(self._hooks):
            if hook.due(trained.step, last=trained.last, elapsed_s=self._clock() - self._ran_at[index]):
                await hook.run(trained)
                self._ran_at[index] = self._clock()


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the seconds of a step went, as the train loop sees it."""

    wait_s: float
    ids_s: float
    step_s: float


def _with_supply(metrics: StepMetrics, ready: ReadyStep, times: StepTimes, told: Mapping[str, float]) -> StepMetrics:
    """The metrics of a step, what supply says about it, and what hooks told of their work before it."""
    rows = sum(report.num_rows for report in ready.reports)
    values = {
        **metrics.values,
        **ready.parts,
        **told,
        "student/wait_s": times.wait_s,
        "student/step_s": times.step_s,
        "step/seconds": times.wait_s + times.ids_s + times.step_s,
        "step/sequences": len(ready.sequence_ids),
        "labels/rows": rows,
        "labels/bytes": sum(report.num_bytes for report in ready.reports),
        "scorer/score_s": sum(report.score_s for report in ready.reports),
    }
    values |= {f"labels/{name}": value for name, value in label_means(ready.reports).items()}
    if used := [report.store for report in ready.reports if report.store is not None]:
        values |= {
            "labels/store_hits": sum(use.hits for use in used),
            "labels/store_misses": sum(use.misses for use in used),
            "labels/store_bytes": sum(use.num_bytes for use in used),
        }
    if times.ids_s:
        values["student/ids_s"] = times.ids_s
    if write_s := ready.parts.get("rollout/write_s"):
        values["rollout/tokens_per_s"] = ready.parts.get("rollout/tokens", 0.0) / write_s
    if ready.answers.written:
        values |= {f"answers/{name}": float(count) for name, count in asdict(ready.answers).items()}
    return StepMetrics(step=metrics.step, values=values)
