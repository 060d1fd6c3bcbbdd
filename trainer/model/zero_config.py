"""The complete DeepSpeed configuration of a run as a pure function, so that GPU settings are tested on a laptop.

Every value that matters is written out, defaults of DeepSpeed included: what a run used can be read in one place and
does not change with its version. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

from typing import Any

from configs.models import Student
from configs.schema import Optimizer

_HOST = "cpu"  # DeepSpeed's word for the memory that offloaded state goes to, whatever the device
_BUCKET_ELEMENTS = {True: 200_000_000, False: 20_000_000}  # by on_accelerator: elements reduced or gathered at once
_SMALLEST_BUCKET = 4_000_000  # elements; a collective of less costs its latency
_BYTES_A_BUCKET_ELEMENT = 100  # of the weights' files: buckets of 1 % of a model, or 2 where files are bfloat16


def deepspeed_config(
    *,
    student: Student,
    optimizer: Optimizer,
    dtype: str,
    on_accelerator: bool,
    hidden_size: int | None = None,
    weight_bytes: int | None = None,
) -> dict[str, Any]:
    """What `deepspeed.initialize` gets as `config`.

    `dtype` is "float32" or "bfloat16"; bfloat16 keeps float32 master weights and optimizer states. `hidden_size` of
    the student sizes ZeRO-3's buffers, `weight_bytes` of its files the buckets of stages 1 and 2; without them they
    have fixed sizes.
    """
    assert dtype in ("float32", "bfloat16"), dtype
    return {
        # Micro-batches are cut by tokens and counted by the trainer, so DeepSpeed is told of one and scales nothing.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},
        "communication_data_type": "bf16" if dtype == "bfloat16" else "fp32",
        "data_types": {"grad_accum_dtype": _accumulation_dtype(student, dtype)},
        "zero_optimization": _zero(
            student, _bucket_elements(on_accelerator, weight_bytes), hidden_size, on_accelerator=on_accelerator
        ),
        # Off accelerators the optimizer is torch's own, which DeepSpeed otherwise refuses to offload.
        "zero_force_ds_cpu_optimizer": on_accelerator,
        "checkpoint": {"tag_validation": "Ignore"},
        "wall_clock_breakdown": False,
    }


def _accumulation_dtype(student: Student, dtype: str) -> str:
    """Gradients of several micro-batches add up in float32. At stage 1 DeepSpeed would switch to another optimizer
    class for that, which keeps a whole float32 gradient per rank: there they add up in the parameters' dtype."""
    return "bf16" if dtype == "bfloat16" and student.zero_stage == 1 else "fp32"


def _bucket_elements(on_accelerator: bool, weight_bytes: int | None) -> int:
    """A bucket is memory of every rank, so that of a small model is small."""
    most = _BUCKET_ELEMENTS[on_accelerator]
    return most if weight_bytes is None else min(most, max(_SMALLEST_BUCKET, weight_bytes // _BYTES_A_BUCKET_ELEMENT))


def _zero(student: Student, bucket: int, hidden_size: int | None, *, on_accelerator: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": student.zero_stage,
        # Overlapping needs streams, and at stage 1 gradients are reduced by `step` alone.
        "overlap_comm": on_accelerator and student.zero_stage >= 2,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
    }
    if student.offload != "none":
        zero["offload_optimizer"] = {"device": _HOST, "pin_memory": on_accelerator}
    if student.zero_stage == 3:
        zero |= _stage_three(bucket, hidden_size, on_accelerator=on_accelerator)
        if student.offload == "optimizer_and_parameters":
            zero["offload_param"] = {"device": _HOST, "pin_memory": on_accelerator}
    return zero


def _stage_three(bucket: int, hidden_size: int | None, *, on_accelerator: bool) -> dict[str, Any]:
    """A bucket holds one square matrix of the model; what is smaller than ten of its rows is never sharded.

    Off accelerators each gather costs more than the memory it saves: there parameters below a million elements stay.
    """
    square = max(hidden_size**2, _SMALLEST_BUCKET) if hidden_size else bucket
    return {
        "reduce_bucket_size": square,
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * (hidden_size or 4096) if on_accelerator else 1_000_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,  # exports are our own safetensors
        "sub_group_size": 1_000_000_000,
    }
