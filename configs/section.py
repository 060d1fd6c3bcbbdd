"""The base of every section of a configuration, and the numbers and names that their fields use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?"
DType = Literal["auto", "bfloat16", "float32"]

MAIN = "main"
"""The name of the only task, where the stations stand at the top level."""

TOGETHER = "+"
"""Joins the names of teachers that are asked about the same tokens; no name holds it."""

Need = Literal[
    "labels",
    "target_event",
    "likeliest_ids",
    "groups",
    "rewards",
    "target_logprobs",
    "target",
    "rollouts",
    "chunks",
    "layers",
]
"""What a term of an objective may need of a task."""

MOST = 2**31 - 1
MOST_SECONDS = 30 * 86400
Positive = Annotated[int, Field(gt=0, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Bytes = Annotated[int, Field(gt=0, le=2**50)]
Weight = Annotated[float, Field(ge=1e-9, le=1e9)]
"""Products of several, over the loss tokens of a step, are numbers of float32."""
Temperature = Annotated[float, Field(ge=0.01, le=100)]
"""What probabilities are sharpened or flattened by. Losses are scaled by its square, which float32 must hold."""
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
"""A longer wait is none: timers of the system overflow, and whoever set it would never hear of a role that hangs."""


class Section(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
