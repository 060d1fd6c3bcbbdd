"""`stillhouse config`: a configuration as it will be run, where its values come from, and its JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.keys import KeyPath, dotted
from configs.load import LoadedRun, dump_run, load_run
from configs.schema import Run


def show(path: Path, overrides: Sequence[str], *, origins: bool) -> str:
    """The resolved configuration as YAML, which loads back to the same run; with `origins` one line for each value."""
    loaded = load_run(path, overrides)
    return "\n".join(_with_origins(loaded)) if origins else dump_run(loaded.run).rstrip("\n")


def schema() -> str:
    """JSON Schema of a configuration, for editors: `# yaml-language-server: $schema=run.schema.json`."""
    return json.dumps(Run.model_json_schema(), indent=2)


def _with_origins(loaded: LoadedRun) -> Iterator[str]:
    for path, value in _leaves(loaded.run.model_dump(mode="json"), ()):
        # A bare kind, `labels: topk`, has its origin one level up.
        written = path[:-1] if path[-1:] == ("kind",) and path not in loaded.origins else path
        origin = loaded.origins[written].text if written in loaded.origins else "default"
        yield f"{dotted(path)} = {json.dumps(value)}    # {origin}"


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value
