"""The learning rate as a pure function of the step, and which parameters decay: nothing here has state to save."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from configs.schema import Optimizer


def learning_rate(step: int, *, settings: Optimizer, total_steps: int) -> float:
    """The rate of optimizer step `step` (1 .. total_steps).

    Rises linearly over `warmup_steps` and reaches the peak at the last of them; afterwards constant, linear or half a
    cosine (arXiv 1608.03983, equation 5, one period) down to `final_fraction` of the peak at the last step.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "linear":
        falling = 1.0 - progress
    else:
        falling = (1.0 + math.cos(math.pi * progress)) / 2
    return peak * (settings.final_fraction + (1.0 - settings.final_fraction) * falling)


def parameter_groups(parameters: Iterable[torch.nn.Parameter], *, settings: Optimizer) -> list[dict[str, Any]]:
    """Trainable parameters in one group, or in two where weight decay is on: norms and biases never decay."""
    trainable = [p for p in parameters if p.requires_grad]
    if not settings.weight_decay:
        return [{"params": trainable, "weight_decay": 0.0}]
    matrices = [p for p in trainable if _num_dimensions(p) > 1]
    vectors = [p for p in trainable if _num_dimensions(p) <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _num_dimensions(parameter: torch.nn.Parameter) -> int:
    """A parameter sharded by ZeRO-3 is empty here and keeps its real shape beside it."""
    return len(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.dim()
