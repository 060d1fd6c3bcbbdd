"""What happens between two steps: evaluation, checkpoints. Each hook says when it is due; the train loop runs them in
the order of its list, evaluation before checkpoint: what an evaluation finds broken is not saved."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import Diverged, InfrastructureError, StudentsLost
from trainer.loop.manifest import TrainingState
from trainer.loop.settings import LoopSettings, every
from trainer.protocols import Hook, Observer, Students
from trainer.threads import in_thread
from trainer.types import Evaluation, Trained

if TYPE_CHECKING:
    from trainer.loop.checkpoint import Checkpoints
    from trainer.loop.job import Job

MAX_FAILED_SAVES = 3


class Evaluate(Hook):
    """The held-out rows, every so many steps and after the last one. Ends the run where the student is broken."""

    def __init__(self, students: Students, observer: Observer, settings: LoopSettings, checkpoint: Checkpoint) -> None:
        self._students = students
        self._observer = observer
        self._settings = settings
        self._checkpoint = checkpoint
        self.latest: Evaluation | None = None

    async def begin(self, step: int) -> None:
        """A run that was killed after a checkpoint may not have come to the evaluation after it."""
        if 0 < step < self._settings.total_steps and self.due(step, last=False, elapsed_s=0.0):
            await self._evaluate(step, last=False)

    def due(self, step: int, *, last: bool, elapsed_s: float) -> bool:
        return self._settings.has_held_out_rows and (last or every(self._settings.evaluate_every, step))

    async def run(self, trained: Trained) -> None:
        await self._evaluate(trained.step, last=trained.last)

    async def _evaluate(self, step: int, *, last: bool) -> None:
        started = time.time()
        evaluation = await self._students.evaluate(step)
        self._observer.span("student", "evaluate", started, time.time(), f"step {step}")
        self._observer.evaluation(evaluation, "after" if last else "during")
        self.latest = evaluation
        if not evaluation.is_finite:
            saved = self._checkpoint.saved_step
            raise diverged(evaluation, last_good=saved if saved < step else 0)


def diverged(evaluation: Evaluation, *, last_good: int) -> Diverged:
    """For an evaluation that is not finite. `last_good`: step of the last checkpoint before it; 0: there is none."""
    what, value = evaluation.headline
    kept = f"The last good checkpoint is that of step {last_good}: training.steps: {last_good} exports its student"
    return Diverged(
        f"the held-out {what} after step {evaluation.step} is {value}: the student is broken, and nothing "
        "of it is exported. Lower optimizer.learning_rate, in a run of another name. "
        + (kept if last_good else "There is no good checkpoint before it")
    )


class Checkpoint(Hook):
    """By steps, by time and after the last step."""

    def __init__(self, save: Callable[[Trained], Awaitable[bool]], observer: Observer, settings: LoopSettings) -> None:
        """`save` writes a checkpoint and returns whether there is one now."""
        self._save = save
        self._observer = observer
        self._settings = settings
        self.saved_step = 0  # 0: there is no checkpoint

    async def begin(self, step: int) -> None:
        self.saved_step = step

    def due(self, step: int, *, last: bool, elapsed_s: float) -> bool:
        """Time counts from the last attempt: three failures in a row end the run, and a disk needs time."""
        return last or every(self._settings.save_every, step) or 0 < self._settings.save_every_s <= elapsed_s

    async def run(self, trained: Trained) -> None:
        started = time.time()
        if await self._save(trained):
            self.saved_step = trained.step
        self._observer.span("student", "save", started, time.time(), f"step {trained.step}")

    async def finish(self, trained: Trained) -> bool:
        if self.saved_step != trained.step:
            await self.run(trained)
        return self.saved_step == trained.step


class CheckpointWriter:
    """Writes the checkpoints of one run: the ranks their shards, this process the manifest that commits them."""

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        students: Students,
        observer: Observer,
        *,
        also: Callable[[Path, int], None] = lambda folder, step: None,
    ) -> None:
        """`also` writes what else belongs to the checkpoint of a step into its folder."""
        self._also = also
        self._job = job
        self._checkpoints = checkpoints
        self._students = students
        self._observer = observer
        self._failed = 0  # in a row

    async def __call__(self, trained: Trained) -> bool:
        """Returns whether the checkpoint exists now. One that cannot be made is noted and training goes on; three in a
        row end the run. A rank that fails while it writes loses the group: its peers wait for it in a collective."""
        temporary = None
        try:
            temporary = await in_thread(self._checkpoints.begin, trained.step)
            await self._students.save(trained.step, temporary)
            await in_thread(self._also, temporary, trained.step)
            await in_thread(self._checkpoints.commit, temporary, self._state(trained))
        except StudentsLost:
            raise
        except (OSError, InfrastructureError) as error:
            if temporary is not None:
                await in_thread(self._checkpoints.discard, temporary)
            self._failed += 1
            self._observer.event("save_failed", at_step=trained.step, error=str(error), in_a_row=self._failed)
            if trained.last or self._failed >= MAX_FAILED_SAVES:
                raise InfrastructureError(
                    f"the checkpoint of step {trained.step} could not be written: {error}"
                ) from None
            return False
        self._failed = 0
        self._observer.event("checkpoint", at_step=trained.step)
        return True

    def _state(self, trained: Trained) -> TrainingState:
        return TrainingState(
            step=trained.step,
            cursor=trained.cursor,
            config_hash=self._job.config_hash,
            world=self._students.world,
            non_finite_steps=trained.non_finite_steps,
            total_steps=self._job.loop.total_steps,
            contents=dict(self._job.contents),
        )
