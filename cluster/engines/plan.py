"""What one engine process is told to run: made by `placement/plans.py`, read by the files of `engines/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.runtime import actors_of
from configs.engines import Engine
from configs.labels import Labels


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a writer draws tokens. The seed of a prompt is derived from `seed` and the prompt's id."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # end of turn; kept in the answer


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Everything one replica needs, the same for all replicas of its role."""

    role: Literal["scorer", "writer"]
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
    teacher: str  # name, for the label header
    weights_version: str
    tokenizer_fingerprint: str
    vocabulary_size: int  # V
    encodings: tuple[Labels, ...] = ()  # all that will be asked of a scorer
    sampling: Sampling | None = field(default=None)  # writers only
    start_timeout_s: float = 600.0  # until it must be ready, the copy included
    local_copy: str | None = None  # folder of the node where a copy of the model is read from
    prefix: str = ""  # of the names of its processes; empty where there is one teacher

    @property
    def actors(self) -> str:
        """What the replicas are called together."""
        return actors_of(self.role, self.prefix)
