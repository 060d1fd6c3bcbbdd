"""Engines: software that runs a teacher's inference. One class of parameters per engine.

`kind: vllm` is `cluster/engines/vllm.py`, whose class `Engine` has these fields.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.section import Bytes, Positive
from configs.stations import Choice, Station


class Engine(Choice):
    """Base of all engines, those of a user's included."""


class Vllm(Engine):
    """vLLM. Where None: decided by role and device in `cluster/engines/vllm.py`."""

    kind: Literal["vllm"] = "vllm"
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of a GPU's memory that the engine takes."
    )
    kv_cache_bytes: Bytes | None = Field(None, description="Of keys and values; instead of a share of the memory.")
    max_num_seqs: Positive | None = Field(None, description="Sequences that are computed at once.")
    max_num_batched_tokens: Positive | None = Field(None, description="Tokens of one pass.")
    enforce_eager: bool | None = Field(
        None, description="Without compilation and CUDA graphs: starts sooner, runs slower."
    )
    load_format: Literal["safetensors", "dummy"] = Field(  # vLLM's auto would read pickles too
        "safetensors", description="dummy: random weights, to measure speed without a model's files."
    )


class Hf(Engine):
    """transformers, in the process itself: no parameters."""

    kind: Literal["hf"] = "hf"


class FromStore(Engine):
    """No model: labels come from the label store alone. Not to be chosen as an engine: `store.mode: only` is."""

    kind: Literal["store"] = "store"


ENGINES = Station(
    Engine,
    (Vllm, Hf),
    package="cluster.engines",
    class_name="Engine",
    default="vllm",
    members=("arguments", "start_scorer", "start_generator"),
    contract="cluster/engines/hf.py",
)
AnyEngine = Annotated[Engine, ENGINES]
