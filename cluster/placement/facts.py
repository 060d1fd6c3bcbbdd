"""What is known of a run's models before anything is resolved or started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class KnownModel:
    """What is known of a model before it is loaded."""

    config: Any | None = None  # of transformers: how it can be split, and how it attends
    num_bytes: int | None = None  # of its weights, for the deadlines; None: not on this machine yet
    files: Mapping[str, str] | None = None  # what they hold (`model_contents`), where the run has a label store


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What was read for a run."""

    vocabulary_size: int  # the true one, without padding
    tokenizer_fingerprint: str
    vocabularies: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # size and fingerprint of other ones
    student: KnownModel = field(default_factory=KnownModel)  # without a config its attention stays as written
    teachers: Mapping[str, KnownModel] = field(default_factory=dict)  # by name, as far as something is known
    offline: bool = False  # all models are folders
    bytecode_folder: str | None = None  # of `runtime.bytecode_folder()`

    def vocabulary_of(self, teacher: str) -> tuple[int, str]:
        """(size, fingerprint) of the vocabulary by which a teacher reads."""
        return self.vocabularies.get(teacher, (self.vocabulary_size, self.tokenizer_fingerprint))
