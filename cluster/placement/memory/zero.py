"""Weights, gradients and optimizer states of one rank, by what DeepSpeed is told (`trainer/model/zero_config.py`).

P trained and F frozen elements of w bytes, W ranks, n = P / W. The ranks' shares are those of DeepSpeed 0.19:

    stage   weights           master   Adam   gradients while micro-batches add up
    1       (P + F) w         4 n*     8 n    P w, and a copy of the share at the step
    2       (P + F) w         4 n*     8 n    float32: 4 n, twice from the second micro-batch on; bfloat16: 4 n
    3       (P + F) w / W,    4 n*     8 n    4 n, and a copy at the step
            and what is gathered              * none where the weights are float32 themselves, and not offloaded

ZeRO: arXiv 1910.02054, section 5. A share of stages 1 and 2 ends inside a parameter, which both neighbours then keep
whole among their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from trainer.model.sizes import ModelSizes

FLOAT32 = 4
_ADAM = 2 * FLOAT32


@dataclass(frozen=True, slots=True)
class ZeroShare:
    """Bytes of a rank. Host bytes are those of offloaded state alone; without an accelerator it is one memory."""

    weights: int
    optimizer: int  # master weights and both moments
    gradients: int  # at the most, while the body's gradients are made
    step: int  # what stands in place of `gradients` while the optimizer works
    gathered: int = 0  # whole parameters at stage 3
    host_optimizer: int = 0
    host_weights: int = 0


def zero_share(
    sizes: ModelSizes, config: Mapping[str, Any], *, width: int, ranks: int, micro_batches: int
) -> ZeroShare:
    """Of the rank that has most. `config`: of `deepspeed_config`; `width`: bytes of a weight."""
    zero = config["zero_optimization"]
    if zero["stage"] == 3:
        return _stage_three(sizes, zero, width=width, ranks=ranks)
    trained = sum(sizes.trained)
    share = -(-trained // ranks)
    touched = largest_touch(sizes.trained, ranks)
    bucket = min(zero["reduce_bucket_size"], trained) * width * (2 if zero["overlap_comm"] else 1)
    sent = min(zero["reduce_bucket_size"], trained) * width  # a bucket is joined once more to be sent
    offloaded = "offload_optimizer" in zero
    states = share * (_ADAM + (FLOAT32 if offloaded or width != FLOAT32 else 0))
    if zero["stage"] == 1:
        gradients, step = trained * width, trained * width + bucket + touched * width
    elif width == FLOAT32:
        kept = touched * FLOAT32
        gradients, step = kept * min(2, micro_batches) + bucket + sent, kept + share * FLOAT32
    else:
        gradients, step = share * FLOAT32 + bucket + sent, share * FLOAT32
    if not offloaded:
        return ZeroShare(sizes.all * width, states, gradients, step)
    largest = max(sizes.trained) * width
    on_host = states + share * (FLOAT32 + width) + largest + (touched * width if micro_batches > 1 else 0)
    on_device = bucket + sent + largest + (trained * width if zero["stage"] == 1 else touched * width)
    return ZeroShare(sizes.all * width, 0, on_device, 0, host_optimizer=on_host)


def _stage_three(sizes: ModelSizes, zero: Mapping[str, Any], *, width: int, ranks: int) -> ZeroShare:
    threshold = zero["stage3_param_persistence_threshold"]
    kept = sum(n for n in sizes.trained if n < threshold)  # never sharded: whole on every rank, and in its share too
    split = sizes.all - kept
    share = sum(-(-n // ranks) for n in sizes.trained)
    weights = -(-sizes.all // ranks) * width + kept * width
    gathered = min(split, zero["stage3_max_live_parameters"]) * width if ranks > 1 else 0
    bucket = max(zero["reduce_bucket_size"], max(sizes.trained)) * width
    prefetched = zero["stage3_prefetch_bucket_size"] * width
    master = share * FLOAT32 if width != FLOAT32 else 0
    states = master + share * _ADAM
    gradients = share * FLOAT32
    if "offload_optimizer" not in zero:
        return ZeroShare(weights, states, gradients + bucket + prefetched, 2 * gradients + bucket, gathered)
    on_host = share * (FLOAT32 + _ADAM) + 2 * gradients
    device = ZeroShare(weights, 0, bucket + prefetched, bucket, gathered, host_optimizer=on_host)
    if "offload_param" not in zero:
        return device
    return ZeroShare(kept * width, 0, bucket + prefetched, bucket, gathered, on_host, host_weights=weights)


def largest_touch(trained: tuple[int, ...], ranks: int) -> int:
    """Elements of all parameters that the fullest of `ranks` equal shares, laid over them in order, has a part of."""
    ends = list(accumulate(trained))
    share = -(-ends[-1] // ranks)
    edges = [0, *ends]
    return max(
        sum(stop - start for start, stop in pairwise(edges) if start < (r + 1) * share and stop > r * share)
        for r in range(ranks)
    )
