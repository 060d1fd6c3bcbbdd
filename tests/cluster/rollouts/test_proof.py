"""When an engine's answer proves that it has the student's weights, and when it proves the contrary."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.rollouts.proof import Proof
from trainer.errors import SyncError
from trainer.types import Probe

IDS = np.arange(5, dtype=np.int32)


def probe(version: int, *logprobs: float, max_gap: float = 0.1) -> Probe:
    return Probe(version, IDS, np.asarray(logprobs, np.float32), max_gap)


def said(*logprobs: float) -> np.ndarray:
    return np.asarray(logprobs, np.float32)


def test_a_gap_within_rounding_is_the_mean_difference() -> None:
    assert Proof("rollout-0").gap(probe(3, -1.0, -2.0, -3.0, -4.0), said(-1.1, -2.0, -2.9, -4.0)) == pytest.approx(0.05)


def test_a_wider_gap_is_told_with_both_numbers() -> None:
    told = (
        r"rollout-0 does not have .* after step 3: .* is -2.5000, the engine's -2.9000, and they differ by 0.4000 nats"
    )
    with pytest.raises(SyncError, match=told):
        Proof("rollout-0").gap(probe(3, -1.0, -2.0, -3.0, -4.0), said(-1.4, -2.4, -3.4, -4.4))


@pytest.mark.parametrize("wrong", [said(-1.0, float("nan")), said(-1.0, -float("inf")), said(-1.0)])
def test_what_is_no_number_or_of_another_text_proves_the_contrary(wrong: np.ndarray) -> None:
    with pytest.raises(SyncError):
        Proof("rollout-0").gap(probe(1, -1.0, -2.0), wrong)


def test_an_engine_that_never_changes_is_found_before_the_gap_is_wide() -> None:
    """Small steps: weights that never came would hide for long in the rounding of bfloat16."""
    proof = Proof("rollout-0")
    proof.gap(probe(0, -1.0, -2.0), said(-1.0, -2.0))
    proof.gap(probe(1, -1.01, -2.01), said(-1.0, -2.0))
    with pytest.raises(
        SyncError, match=r"after step 2: it says the same .* has moved by 0.0300 nats a token, to -1.5300"
    ):
        proof.gap(probe(2, -1.03, -2.03), said(-1.0, -2.0))


def test_an_engine_that_follows_may_lag_by_rounding() -> None:
    proof = Proof("rollout-0")
    for version in range(20):
        student = -1.0 - 0.03 * version
        proof.gap(probe(version, student, student), said(round(student, 1) - 1e-4 * version, student))


def test_an_engine_that_was_started_again_says_what_it_said_before() -> None:
    proof = Proof("rollout-0")
    for _ in range(2):
        assert proof.gap(probe(4, -1.0, -2.0), said(-1.0, -2.0)) == 0.0
