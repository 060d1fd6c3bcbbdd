"""Sizes that no model has: asked of config.json as it stands, because a library builds what it says, layer by layer,
before anything else could tell that it is absurd."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from configs.models import ModelSource
from trainer.errors import ConfigError, foreign_errors

_MOST_LAYERS = 1_000
BOUNDS = (
    (re.compile(r"(layers?|blocks?|depth)$"), _MOST_LAYERS),  # each is built as objects, which takes milliseconds
    (re.compile(r"experts?(_per_\w+)?$"), 10_000),
    (re.compile(r"(^vocab_size|_size|_dim|_rank|_heads?|^[dn]_\w+|^num_\w+|^max_position_embeddings)$"), 2**31 - 1),
)
"""What a name ends or begins with, and the largest number it may stand for."""

_LARGEST_FILE = 64 * 2**20


def refuse_absurd_sizes(source: ModelSource, *, role: str) -> None:
    """Raises `ConfigError` naming file and key where config.json, nested parts included, has a size beyond `BOUNDS`."""
    file = config_file(source, role=role)
    if file is None:
        return
    with foreign_errors(f"{role}: cannot read {file}"):
        if file.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{role}: {file} has {file.stat().st_size} bytes, which no configuration has")
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConfigError(f"{role}: {file} holds no JSON object")
    for key, value in _numbers(content):
        bound = next((bound for pattern, bound in BOUNDS if pattern.search(key)), None)
        if bound is not None and (value > bound or math.isnan(value)):
            raise ConfigError(f"{role}: {file} says {key}: {value}, and no model has more than {bound}; correct it")
        if bound == _MOST_LAYERS and value < 0:
            raise ConfigError(f"{role}: {file} says {key}: {value}; a model has layers")


def config_file(source: ModelSource, *, role: str) -> Path | None:
    """config.json of a folder or of a model of the hub; None where it has none or cannot be asked for."""
    folder = Path(source.path)
    if folder.is_dir():
        return folder / "config.json" if (folder / "config.json").is_file() else None
    with foreign_errors(f"{role}: cannot read the configuration of {source.path}"):
        found = cached_file(
            source.path,
            "config.json",
            revision=source.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if found is None else Path(found)


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(key, number) of all numbers, nested objects and the numbers of lists included."""
    todo: list[tuple[str, Any]] = list(content.items())
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo.extend(value.items())
        elif isinstance(value, list):
            todo.extend((key, item) for item in value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
