"""In which form an engine takes in weights."""

from __future__ import annotations

from cluster.engines.plan import EnginePlan
from configs.engines import Vllm
from configs.models import Rollouts
from trainer.types import WeightForm


def form_of(plan: EnginePlan, rollouts: Rollouts) -> WeightForm:
    """vLLM reads names as they stand in files, the engine of transformers those of its modules."""
    return WeightForm(plan.dtype, rollouts.bucket_bytes, stored_names=isinstance(plan.engine, Vllm))
