"""Loading a configuration for commands that start or examine a run. The schema knows more than runs can do yet: what
they cannot is refused here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.labels import NoLabels, Token
from configs.load import LoadedRun, load_run
from configs.schema import Run
from trainer.errors import ConfigError


def load_supported(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """As `load_run`. Raises `ConfigError` also for several teachers or tasks, and for a run without a teacher's
    labels."""
    loaded = load_run(path, overrides)
    if what := _unsupported(loaded.run):
        raise ConfigError(f"{path}: {what}")
    return loaded


def _unsupported(run: Run) -> str:
    if run.tasks or run.teachers or run.route:
        what = "tasks" if run.tasks else "teachers by name"
        return f"{what} cannot be run yet: write one teacher, and the stations at the top level"
    if run.teacher is None or isinstance(run.labels, NoLabels):
        return "an objective without a teacher's labels cannot be run yet: write teacher and labels: topk"
    for term in run.objective:
        if term.form == "sequence":
            return f"loss: {term.loss} cannot be run yet: write another loss"
    if isinstance(run.labels, Token):
        return "labels: token cannot be run yet: write labels: topk"
    return ""
