"""A student's weights on their way to the engines that write with them, and the text that proves that they came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BucketRef = Any
"""Where a `WeightBucket` lies: itself, or a reference of Ray."""


@dataclass(frozen=True, slots=True)
class WeightForm:
    """How engines want weights to come."""

    dtype: str  # name of torch
    bucket_bytes: int  # about
    stored_names: bool  # as in the files of a model, else as in its modules


@dataclass(frozen=True, slots=True)
class BucketHeader:
    """What the controller reads of a bucket, which itself never passes through it."""

    version: int  # optimizer steps that the weights were trained
    index: int
    count: int  # of the buckets of this version
    num_bytes: int

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


@dataclass(frozen=True, slots=True)
class WeightBucket:
    """Some of the weights that training changes."""

    header: BucketHeader
    dtype: str
    weights: Mapping[str, np.ndarray]  # by name; bfloat16 as uint16 bits


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed text, and what the student says of it with the weights of a version."""

    version: int
    token_ids: np.ndarray  # int32 [L]
    logprobs: np.ndarray  # float32 [L - 1], of tokens 1 .. L - 1
    max_gap: float  # mean absolute difference of log-probabilities, in nats


def probe_gap(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean absolute difference; infinite where one is not finite or the lengths differ."""
    if expected.shape != found.shape or not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return float("inf")
    return float(np.abs(expected - found).mean())
