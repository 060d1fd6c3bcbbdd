"""What `check` says of tasks whose text the student writes."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.engines.vllm_registry import check_architecture
from cluster.placement.roles import rollouts_of
from cluster.preflight.finding import Finding, attempt, ok, warning
from configs.answers import StudentAnswers
from configs.engines import Vllm
from configs.rules import station_place
from configs.schema import Run
from trainer.model.load import load_config


def examine_rollouts(run: Run) -> Iterator[Finding]:
    """How old a text can be, from which distribution it is drawn, and whether a run that goes on is the same."""
    rollouts = rollouts_of(run)
    if rollouts is None:
        return
    depth, every, save = run.training.depth, rollouts.sync_every, run.training.save_every
    oldest = depth + every - 1
    text = "written by the weights that it trains" if oldest == 0 else f"at most {oldest} optimizer steps old"
    if isinstance(rollouts.engine, Vllm):
        yield from _engine(run)
    yield ok("rollouts", f"the student's text is {text} (training.depth: {depth}, rollouts.sync_every: {every})")
    if every > 1 and save % every:
        text = f"rollouts.sync_every: {every}: a run that goes on from a checkpoint between two transfers begins with "
        text += "newer weights than an uninterrupted one wrote with"
        yield warning("rollouts", text, f"write training.save_every: {every}, or a multiple, for the same numbers")
    for task in run.resolved_tasks().values():
        if isinstance(task.answers, StudentAnswers) and (otherwise := task.answers.draws_otherwise):
            text = f"{station_place(run, task, 'answers')}: {otherwise} draw from another distribution than the "
            text += "student's: divergences are right on any text, ratios of probabilities and rewards are not"
            yield warning("rollouts", text)


def _engine(run: Run) -> Iterator[Finding]:
    """Whether vLLM has a model for the student, as far as that can be known without starting one."""

    def look() -> None:
        config = load_config(run.student.model, role="student.model")
        check_architecture(config, place=f"student.model.path: {run.student.model.path}")

    found = attempt("rollouts", look, str)
    if found.fatal:
        yield found
