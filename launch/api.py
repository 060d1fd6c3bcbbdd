"""The Python API, for notebooks and pipelines: start a run, read one, use its student.

    from launch.api import check, distil, load_run

    distil(config)  ->  `python -m launch train` in a process of its own  ->  RunResult, or the error as an exception
                         its lines come here as it prints them

A run wants its own process: environment variables have to be there before torch is imported, signals reach a main
thread alone, asyncio runs no loop inside a notebook's own, memory is given back at the end, and a run that cannot be
ended otherwise ends its process, which must not be the notebook. Importing this file imports neither torch nor Ray.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.document import dump
from configs.load import load_run as load_config
from configs.load import run_folder
from configs.schema import Run
from launch.api_process import Log, run_command
from launch.api_result import RunResult as RunResult
from trainer.errors import ConfigError as ConfigError
from trainer.errors import DataError as DataError
from trainer.errors import Diverged as Diverged
from trainer.errors import InfrastructureError as InfrastructureError
from trainer.errors import Preempted as Preempted
from trainer.errors import StillhouseError as StillhouseError
from trainer.run_folder import RunFolder

Config = str | Path | Mapping[str, Any] | Run
"""A YAML file, what would stand in one, or a `Run`. Paths in it are relative to the working directory."""

_show: Log = partial(print, flush=True)


def check(config: Config, overrides: Mapping[str, Any] | None = None, *, log: Log = _show) -> None:
    """Look at all that can be known of a run before it starts; one line a thing goes to `log`.

    Raises `ConfigError` or `DataError` with the problems where it may not start.
    """
    with _written(config, overrides) as named:
        named.load()
        run_command(["check", *named.arguments], log=log, public=named.public)


def distil(
    config: Config, overrides: Mapping[str, Any] | None = None, *, log: Log = _show, skip_self_test: bool = False
) -> RunResult:
    """Run a distillation to its end, as `stillhouse train` does, and return what it made.

    `overrides` are keys with dots and their values, `{"training.steps": 20}`. Equal calls resume a run that was
    stopped, and return at once the result of one that is finished. Each line that the run prints goes to `log`.

    Raises `ConfigError`, `DataError`, `InfrastructureError`, `Diverged`, or another `StillhouseError`, with the text
    that the command would show; `Preempted` where it was asked to stop and saved a checkpoint. An interrupt (Ctrl-C, or
    the notebook's stop button) lets the run finish its step and save, a second one ends it at once; then it is a
    `KeyboardInterrupt`. If this process dies, the run is asked to stop.
    """
    with _written(config, overrides) as named:
        folder = run_folder(named.load())
        flags = ["--skip-self-test"] if skip_self_test else []
        run_command(["train", *named.arguments, *flags], log=log, public=named.public)
    return load_run(folder)


def load_run(folder: str | Path) -> RunResult:
    """The result of a run from its folder; also of one that is going on, or was fetched from elsewhere.

    Raises `ConfigError` where the folder holds no run.
    """
    found = RunFolder(Path(folder).expanduser())
    if not found.config.is_file():
        hint = "" if found.path.exists() else ", there is no such folder"
        raise ConfigError(f"{found.path} is no run folder: it has no config.yaml{hint}. A run lies in runs/<its name>")
    return RunResult(found)


@contextmanager
def _written(config: Config, overrides: Mapping[str, Any] | None) -> Iterator[_Named]:
    """Inside, the arguments of a command that name the configuration."""
    if not isinstance(overrides, Mapping | None):
        raise ConfigError(f'overrides are a mapping, for example {{"training.steps": 20}}; these are {overrides!r:.60}')
    changes = [f"{key}={_json(value)}" for key, value in (overrides or {}).items()]
    if isinstance(config, str | Path):
        yield _Named(Path(config), changes, hidden="")
        return
    with tempfile.TemporaryDirectory(prefix="stillhouse-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "config.yaml"
        with file.open("w", encoding="utf-8") as text:
            dump(_plain(config), text)
        yield _Named(file, changes, hidden=str(file))


@dataclass(frozen=True)
class _Named:
    """A configuration as the commands take it."""

    file: Path
    changes: Sequence[str]  # what --set takes
    hidden: str  # name of a file of ours, which says nothing to whoever reads a message

    @property
    def arguments(self) -> list[str]:
        return [str(self.file), *(part for change in self.changes for part in ("--set", change))]

    def load(self) -> Run:
        """Before a process is started: mistakes come at once."""
        try:
            return load_config(self.file, self.changes).run
        except ConfigError as error:
            raise ConfigError(self.public(str(error))) from None

    def public(self, text: str) -> str:
        return re.sub(re.escape(self.hidden) + r"(:\d+)?", "config", text) if self.hidden else text


def _plain(config: Mapping[str, Any] | Run) -> Any:
    """Only what YAML has."""
    return json.loads(_json(config.model_dump(mode="json") if isinstance(config, Run) else config))


def _json(values: Any) -> str:
    """Raises ConfigError for what is neither JSON nor a path."""
    try:
        return json.dumps(values, default=_path_text, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config: {error}. A configuration is made of texts, numbers, lists and mappings") from None


def _path_text(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r:.60} is of type {type(value).__name__}")
