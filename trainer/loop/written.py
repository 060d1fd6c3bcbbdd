"""What the student wrote for steps that are not trained yet, and its file in a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import ConfigError
from trainer.types import Completion

FILE = "rollouts.npz"

Completions = Mapping[str, Completion]
"""By the id of the request."""


class Written:
    """By step and task."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[str, Completions]] = {}

    def of(self, step: int, task: str) -> Completions:
        return self._steps.get(step, {}).get(task, {})

    def keep(self, step: int, task: str, completions: Completions) -> None:
        self._steps.setdefault(step, {})[task] = completions

    def forget(self, step: int) -> None:
        """What was written up to a step, which is trained."""
        self._steps = {later: tasks for later, tasks in self._steps.items() if later > step}

    def save(self, folder: Path, *, after: int) -> None:
        """What was written for steps after `after`, as a file in an existing folder; none where that is nothing."""
        entries = [
            (step, task, key, one)
            for step, tasks in self._steps.items()
            for task, completions in tasks.items()
            for key, one in completions.items()
            if step > after
        ]
        if not entries:
            return
        told = [[step, task, key, one.finish_reason, one.author, one.versions] for step, task, key, one in entries]
        lengths = [len(one.token_ids) for *_, one in entries]
        with (folder / FILE).open("wb") as out:
            np.savez(
                out,
                told=np.frombuffer(json.dumps(told).encode(), dtype=np.uint8),
                lengths=np.asarray(lengths, dtype=np.int64),
                token_ids=np.concatenate([one.token_ids for *_, one in entries]),
                logprobs=np.concatenate([one.logprobs for *_, one in entries]),
            )
            out.flush()
            os.fsync(out.fileno())

    @classmethod
    def load(cls, folder: Path) -> Written:
        """From a checkpoint that was verified; of one without the file nothing. Raises `ConfigError`."""
        made, file = cls(), folder / FILE
        if not file.is_file():
            return made
        try:
            with np.load(file, allow_pickle=False) as arrays:
                told: list[list[Any]] = json.loads(arrays["told"].tobytes())
                borders = np.cumsum(arrays["lengths"])[:-1]
                texts = zip(
                    np.split(arrays["token_ids"], borders), np.split(arrays["logprobs"], borders), told, strict=True
                )
                for ids, logprobs, (step, task, key, reason, author, versions) in texts:
                    spans = tuple((int(start), str(version)) for start, version in versions)
                    one = Completion(ids.copy(), logprobs.copy(), reason, author, spans)
                    made._steps.setdefault(step, {}).setdefault(task, {})[key] = one
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} holds no text of the student: {error}") from None
        return made
