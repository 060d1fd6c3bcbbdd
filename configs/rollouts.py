"""Rules of rollout engines, the replicas of the student that write the text which it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.models import Rollouts
    from configs.schema import Run

Place = tuple[str | int, ...]
Problem = tuple[Place, Any, str]


def rollout_problems(run: Run) -> Iterator[Problem]:
    """Whether the student writes where it is asked to, and only there."""
    tasks = run.resolved_tasks().values()
    writing = [task for task in tasks if task.answers.needs_rollouts]
    if not writing:
        if run.rollouts is not None:
            text = "no task lets the student write: remove rollouts, or write answers: student"
            yield ("rollouts",), None, text
        return
    for task in writing:
        own = run.tasks.get(task.name)
        at: Place = ("answers",) if own is None or own.answers is None else ("tasks", task.name, "answers")
        if task.align is not None:
            text = "a teacher with another tokenizer reads no text of the student yet: write answers: dataset, or name "
            yield at, task.answers.kind, text + "a teacher with the student's tokenizer"
    if run.rollouts is None:
        text = f"answers: {writing[0].answers.kind} are written by engines that hold the student: add rollouts, if "
        yield ("rollouts",), None, text + "only rollouts: {}"
        return
    yield from _engines(run, run.rollouts)
    if run.store is not None and run.store.mode == "only":
        yield ("store", "mode"), "only", "holds no labels of text that is yet to be written: write mode: read_write"


def _engines(run: Run, rollouts: Rollouts) -> Iterator[Problem]:
    vllm = rollouts.engine.kind == "vllm"
    if run.runtime == "in_process" and vllm:
        text = "runtime: in_process needs an engine without processes of its own: write engine: hf"
        yield ("rollouts", "engine"), "vllm", text
    if run.runtime == "in_process" and rollouts.replicas != 1:
        text = "runtime: in_process has one process: write replicas: 1"
        yield ("rollouts", "replicas"), rollouts.replicas, text
    if rollouts.tensor_parallel_size != 1:
        text = "weights are taken in by engines on one device each: write tensor_parallel_size: 1 and more replicas"
        yield ("rollouts", "tensor_parallel_size"), rollouts.tensor_parallel_size, text
    if getattr(rollouts.engine, "load_format", "") == "dummy":
        text = "frozen weights come from the student's files: write load_format: safetensors"
        yield ("rollouts", "engine", "load_format"), "dummy", text
