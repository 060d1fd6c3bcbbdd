"""Loading a configuration for commands that start or examine a run. The schema knows more than runs can do yet: what
they cannot is refused here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.answers import Answers
from configs.load import LoadedRun, load_run
from configs.schema import Run
from trainer.errors import ConfigError


def load_supported(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """As `load_run`. Raises `ConfigError` also where a route would say who writes the answers, and where one teacher
    would write in several ways."""
    loaded = load_run(path, overrides)
    if what := _unsupported(loaded.run):
        raise ConfigError(loaded.located(what))
    return loaded


def _unsupported(run: Run) -> str:
    written: dict[str, Answers] = {}
    for task in run.resolved_tasks().values():
        if not task.answers.needs_generator:
            continue
        place = f"tasks.{task.name}.answers" if run.tasks else "answers"
        if task.route is not None:
            each = "give each teacher a task of its own"
            return f"{place}: answers of a teacher that `route` names cannot be written yet: {each}"
        for name in task.teachers:
            if written.setdefault(name, task.answers) != task.answers:
                each = "give them the same answers, or a teacher each"
                return f"{place}: teacher {name} writes for several tasks: {each}"
    return ""
