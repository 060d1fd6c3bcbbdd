"""`stillhouse sync`: the numbers of a run that is over, sent to its trackers, or to others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from configs.load import load_run
from launch.check.trackers import installed
from launch.report.metrics import read_metrics
from launch.trackers.trackers import Trackers
from trainer.errors import ConfigError, InfrastructureError
from trainer.run_folder import RunFolder

SEND_S = 600.0
"""For all trackers together: nobody waits for a GPU meanwhile."""


def sync(path: Path, overrides: Sequence[str]) -> None:
    """Send what each tracker does not have yet. Raises `ConfigError` for a folder that holds no run or names no
    tracker, `InfrastructureError` where something could not be sent."""
    folder = RunFolder(path)
    if not folder.config.exists() or not folder.metrics.exists():
        raise ConfigError(
            f"{path} holds no run with numbers: {folder.metrics.name} and {folder.config.name} are needed"
        )
    loaded = load_run(folder.config, [*overrides, f"folder={path}"])
    run = loaded.run
    if not run.trackers:
        example = f"stillhouse sync {path} --set 'trackers=[tensorboard]'"
        raise ConfigError(f"{folder.config} names no tracker; name one, for example: {example}")
    if missing := list(installed(run)):
        raise ConfigError(loaded.located("\n".join(finding.message for finding in missing)))
    with folder.lock():
        records = read_metrics(folder, tell=typer.echo)
        ending = folder.ending()
        last = max((one.step for one in (*records.steps, *records.evaluations)), default=0)
        trackers = Trackers(run, folder, goes_on=True, tell=typer.echo, close_s=SEND_S)
        with trackers:
            trackers.rewound(last)
            code, reason = (1, "it has not ended") if ending is None else (ending.code, ending.reason)
            complete = trackers.close(code, reason)
    if not complete:
        raise InfrastructureError("not everything was sent; the same command again goes on from there")
    typer.echo(f"sent: {len(records.steps)} steps, {len(records.evaluations)} evaluations")
