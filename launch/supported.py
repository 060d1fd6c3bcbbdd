"""Loading a configuration for commands that start or examine a run. The schema knows more than runs can do yet: what
they cannot is refused here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.labels import NoLabels
from configs.load import LoadedRun, load_run
from configs.schema import Run
from trainer.errors import ConfigError


def load_supported(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """As `load_run`. Raises `ConfigError` also for several teachers or tasks, and for a run without a teacher's
    labels."""
    loaded = load_run(path, overrides)
    if what := _unsupported(loaded.run):
        raise ConfigError(f"{path}: {what} cannot be run yet: write one teacher and the stations at the top level")
    return loaded


def _unsupported(run: Run) -> str:
    if run.tasks:
        return "tasks"
    if run.teachers or run.route:
        return "teachers by name"
    if run.teacher is None or isinstance(run.labels, NoLabels):
        return "an objective without a teacher's labels"
    return ""
