"""What a run folder holds of a run that is started: nothing, a part of it, all of it, or another run.

other tasks              refused: each has a cursor of its own in the checkpoint
another configuration    refused: it would be another run in the same folder
other inputs             refused, or noted with training.on_changed_inputs: note
more steps or epochs     goes on, and says what becomes of the learning rate; fewer than are trained are refused
the same, and finished   nothing to do
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from configs.load import config_hash, differences, load_run
from configs.schema import Run
from configs.section import MAIN
from launch.contents import changes
from trainer.errors import ConfigError
from trainer.loop.checkpoint import Checkpoints
from trainer.loop.manifest import TrainingState
from trainer.model.optimizer import learning_rate
from trainer.run_folder import RunFolder

ANOTHER = "give this one another name or folder, or remove the folder to start afresh"


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run has come in its folder."""

    after: TrainingState | None = None  # of the newest checkpoint
    finished: bool = False
    changed: tuple[str, ...] = ()  # inputs that are not what the run began with, to be told


def standing(run: Run, folder: RunFolder, contents: Mapping[str, str]) -> Standing:
    """Raises `ConfigError` where the folder holds something that this run must not go on from, or not replace. Writes
    nothing."""
    try:
        after = Checkpoints(folder.checkpoints, keep=1).peek()
    except OSError as error:
        raise ConfigError(f"folder: the checkpoints of {folder.path} cannot be read: {error}") from None
    if after is not None:
        _refuse_other_tasks(run, folder, after)
    before, finished = _before(folder), _was_finished(folder)
    _refuse_another_configuration(run, before, folder, after, finished=finished)
    told = refuse_changes(run, folder, after, contents) if after is not None else []
    if after is not None:
        _refuse_shorter(run, after)
    same_length = before is not None and _length(before) == _length(run)
    if finished and not same_length and after is None:
        raise ConfigError(
            f"{folder.path} holds a run that is finished and has no checkpoint any more, so it cannot become longer: "
            f"{ANOTHER}"
        )
    return Standing(after, finished=finished and same_length, changed=tuple(told))


def refuse_changes(run: Run, folder: RunFolder, after: TrainingState, contents: Mapping[str, str]) -> list[str]:
    """What is to be told of inputs that changed, as far as both sides know of them: other versions may look at others.
    Raises `ConfigError` for a change that decides what is learnt, unless the run asks for a note."""
    both = {_input(place) for place in contents} & {_input(place) for place in after.contents}
    was, now = ({p: text for p, text in side.items() if _input(p) in both} for side in (after.contents, contents))
    decisive, others = changes(was, now, run)
    if decisive and run.training.on_changed_inputs == "error":
        raise ConfigError(
            f"{folder.path} holds {after.step} steps of this run, made from other inputs:\n  "
            + "\n  ".join(decisive)
            + f"\nput back what was there; or {ANOTHER}; or go on with what is there now: training.on_changed_inputs: "
            "note"
        )
    in_checkpoint = " (of no effect: the checkpoint holds the trained weights)"
    told = [f"{text}{in_checkpoint if text.startswith('student.model/') else ''}" for text in others]
    return [f"changed since step {after.step}: {text}" for text in (*decisive, *told)]


def _input(place: str) -> str:
    """`teacher.model` of `teacher.model/config.json`."""
    return place.partition("/")[0]


def new_length(run: Run, after: TrainingState | None, total_steps: int) -> str | None:
    """What is to be told where a run goes on with another length than its checkpoint was made with."""
    if after is None or after.total_steps in (0, total_steps):
        return None
    text = f"the run has {total_steps} steps now, it had {after.total_steps}"
    settings = run.optimizer
    if settings.schedule == "constant" or after.step >= total_steps:
        return text
    rates = [
        learning_rate(step, settings=settings, total_steps=total)
        for step, total in ((after.step, after.total_steps), (after.step + 1, total_steps))
    ]
    return (
        f"{text}: from step {after.step + 1} on the learning rate follows the schedule of {total_steps} steps (step "
        f"{after.step} had {rates[0]:.3g}, step {after.step + 1} gets {rates[1]:.3g}), so the result is not that of a "
        f"run of {total_steps} steps from the beginning"
    )


def _before(folder: RunFolder) -> Run | None:
    """The configuration of the last start; None for none, or that of an earlier version."""
    try:
        return load_run(folder.config).run
    except ConfigError:
        return None


def _was_finished(folder: RunFolder) -> bool:
    """Whether an earlier start came to its end. Of an exit.json that cannot be read nobody knows: the run then goes on
    from its last checkpoint, and writes a new one."""
    try:
        ending = folder.ending()
    except ConfigError as error:
        print(f"warning: {error}; the run goes on as if it had not ended", file=sys.stderr)
        return False
    return ending is not None and ending.code == 0


def _length(run: Run) -> tuple[int | None, int | None]:
    return run.training.steps, run.training.epochs


def _refuse_other_tasks(run: Run, folder: RunFolder, after: TrainingState) -> None:
    was, now = (tuple(tasks) or (MAIN,) for tasks in (after.cursor.tasks, run.tasks))
    if was == now:  # in their order too, by which steps are drawn
        return
    was, now = ("one task alone" if names == (MAIN,) else f"the tasks {', '.join(names)}" for names in (was, now))
    raise ConfigError(
        f"tasks: the run in {folder.path} was trained on {was}, and this one has {now}: put them back, or {ANOTHER}"
    )


def _refuse_another_configuration(
    run: Run, before: Run | None, folder: RunFolder, after: TrainingState | None, *, finished: bool
) -> None:
    changed = differences(before, run) if before is not None else []
    if changed and (finished or any(folder.checkpoints.glob("step_*"))):
        raise ConfigError(
            f"{folder.path} holds a run with another configuration:\n  " + "\n  ".join(changed) + f"\n{ANOTHER}"
        )
    if after is not None and after.config_hash != config_hash(run):
        raise ConfigError(
            f"{folder.path} holds a checkpoint of another configuration (hash {after.config_hash}, this one has "
            f"{config_hash(run)}): {ANOTHER}"
        )


def _refuse_shorter(run: Run, after: TrainingState) -> None:
    steps, epochs = _length(run)
    if steps is not None and steps < after.step:
        raise ConfigError(
            f"training.steps: {steps} is less than the {after.step} that are trained; write at least {after.step}, or "
            f"{ANOTHER}"
        )
    begun = after.cursor.epoch + (after.cursor.position > 0)
    if epochs is not None and epochs < begun:
        raise ConfigError(
            f"training.epochs: {epochs} is less than what is trained, which reaches into epoch {begun}; write at least "
            f"{begun}, or {ANOTHER}"
        )
