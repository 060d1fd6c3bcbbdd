"""What one engine process is told to run: made by `placement/plans.py`, read by the files of `engines/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.runtime import ROLLOUT, STUDENT, actors_of
from configs.engines import Engine
from configs.labels import Labels

LABEL_CHUNK_ROWS = 512
"""Rows of labels whose logits exist at once: many enough for an efficient product with lm_head, few enough to stay
small."""


@dataclass(frozen=True, slots=True)
class StorePlan:
    """Where a scorer's labels are kept, and what is to be known of the teacher that makes them."""

    path: str
    max_bytes: int
    writes: bool
    teacher: Mapping[str, Any]  # of `LabelSpace`: plain values


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Everything one replica needs, the same for all replicas of its role."""

    role: Literal["scorer", "generator", "rollout"]
    engine: Engine  # its parameters
    model: str
    revision: str | None
    trust_remote_code: bool
    dtype: str  # "float32" or "bfloat16"
    device_type: str
    tensor_parallel_size: int
    max_length: int  # longest sequence in tokens
    arguments: Mapping[str, Any]  # complete keyword arguments of the engine's own constructor
    environment: Mapping[str, str]  # of the actor's process, set before it starts
    teacher: str  # name, for the label header; of a rollout engine the student's
    weights_version: str
    tokenizer_fingerprint: str
    vocabulary_size: int  # V
    encodings: tuple[Labels, ...] = ()  # all that will be asked of a scorer
    start_timeout_s: float = 600.0  # until it must be ready, the copy included
    local_copy: str | None = None  # folder of the node where a copy of the model is read from
    store: StorePlan | None = None
    prefix: str = ""  # of the names of its processes; empty where there is one teacher
    beside: EnginePlan | None = None  # another engine of the same process: a generator beside a scorer

    @property
    def author(self) -> str:
        """Who wrote what a generator writes."""
        if self.role == ROLLOUT:
            return STUDENT
        return f"teacher:{self.prefix}" if self.prefix else "teacher"

    @property
    def whose(self) -> str:
        """For messages."""
        return "the student" if self.role == ROLLOUT else f"teacher {self.teacher}"

    @property
    def actors(self) -> str:
        """What the replicas are called together."""
        return actors_of(self.role, self.prefix)
