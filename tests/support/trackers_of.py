"""A run of nothing but its log, followed by trackers in their own processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.load import load_run
from configs.schema import Run
from launch.trackers.trackers import Trackers
from trainer.run_folder import RunFolder
from trainer.types import Evaluation, StepMetrics

YAML = """
name: tiny
folder: {folder}/run
student: {{model: {{path: s, licence: mit}}}}
teacher: {{model: {{path: t, licence: mit}}}}
prompts: {{path: rows.jsonl}}
training: {{steps: 9}}
trackers: {trackers}
"""


def run_with(folder: Path, *trackers: dict[str, Any] | str) -> tuple[Run, RunFolder]:
    """A configuration, and the folder of its run."""
    (folder / "run.yaml").write_text(YAML.format(folder=folder, trackers=json.dumps(trackers)))
    return load_run(folder / "run.yaml").run, RunFolder.create(folder / "run")


@contextmanager
def followed(
    folder: Path, tracker: dict[str, Any] | str, told: list[str], *, goes_on: bool = False
) -> Iterator[tuple[Trackers, RunFolder]]:
    run, where = run_with(folder, tracker)
    with Trackers(run, where, goes_on=goes_on, tell=told.append) as followers:
        yield followers, where


def step(number: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(number, {"train/loss": loss})


def evaluation(number: int) -> Evaluation:
    return Evaluation(number, num_rows=3, forward_kl=0.5, agreement=0.5, perplexity=9.0, teacher_perplexity=8.0)


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.05)
