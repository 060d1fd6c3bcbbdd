"""The DeepSpeed configuration as DeepSpeed's own class reads it, for laptops and GPU nodes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from configs.models import ModelSource, Student
from configs.schema import Optimizer
from trainer.model.zero_config import deepspeed_config

SETTINGS = [
    (stage, offload, dtype, accelerator)
    for stage, offload, dtype, accelerator in itertools.product(
        (1, 2, 3), ("none", "optimizer", "optimizer_and_parameters"), ("float32", "bfloat16"), (False, True)
    )
    if stage == 3 or offload != "optimizer_and_parameters"
]


def _config(stage: int, offload: str, dtype: str, accelerator: bool) -> dict:
    student = Student(model=ModelSource(path="m"), zero_stage=stage, offload=offload)
    optimizer = Optimizer(max_grad_norm=0.7)
    return deepspeed_config(
        student=student, optimizer=optimizer, dtype=dtype, on_accelerator=accelerator, hidden_size=4096
    )


@pytest.mark.parametrize(("stage", "offload", "dtype", "accelerator"), SETTINGS)
def test_deepspeed_reads_what_was_meant(stage: int, offload: str, dtype: str, accelerator: bool) -> None:
    config = _config(stage, offload, dtype, accelerator)
    assert json.loads(json.dumps(config)) == config
    parsed = DeepSpeedConfig(config)
    zero = parsed.zero_config
    assert (parsed.zero_optimization_stage, parsed.gradient_clipping) == (stage, 0.7)
    assert parsed.bfloat16_config.enabled == (dtype == "bfloat16")
    assert not parsed.managed_gradient_accumulation
    assert parsed.gradient_accumulation_steps == 1
    assert zero.overlap_comm == (accelerator and stage >= 2)
    assert (zero.offload_optimizer is not None) == (offload != "none")
    assert (zero.offload_param is not None) == (offload == "optimizer_and_parameters")
    for place in (zero.offload_optimizer, zero.offload_param):
        assert place is None or (place.device, place.pin_memory) == ("cpu", accelerator)
    if stage == 3:
        assert zero.prefetch_bucket_size == int(0.9 * 4096**2)
        assert zero.param_persistence_threshold == (40960 if accelerator else 1_000_000)


def test_no_key_is_misspelt() -> None:
    """DeepSpeed ignores keys that it does not know; its own class has a field or reads a constant for each of ours."""
    import inspect

    from deepspeed.runtime import config as reader
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    source = inspect.getsource(reader)
    config = _config(3, "optimizer_and_parameters", "bfloat16", True)
    for key in config:
        assert key in known or f'"{key}"' in source, key
    zero_keys = set(DeepSpeedZeroConfig.model_fields)
    zero_keys |= {field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias}
    assert set(config["zero_optimization"]) <= zero_keys


def test_it_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, trainer.model.zero_config; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def _buckets(weight_bytes: int | None, *, accelerator: bool) -> set[int]:
    student, optimizer = Student(model=ModelSource(path="m"), zero_stage=2), Optimizer()
    config = deepspeed_config(
        student=student, optimizer=optimizer, dtype="float32", on_accelerator=accelerator, weight_bytes=weight_bytes
    )
    return {config["zero_optimization"][name] for name in ("reduce_bucket_size", "allgather_bucket_size")}


@pytest.mark.parametrize("accelerator", [False, True])
def test_buckets_are_as_small_as_the_model(accelerator: bool) -> None:
    most = max(_buckets(None, accelerator=accelerator))
    assert _buckets(200_000_000, accelerator=accelerator) == {4_000_000}
    assert _buckets(1_500_000_000, accelerator=accelerator) == {15_000_000}
    assert _buckets(10**12, accelerator=accelerator) == {most}
