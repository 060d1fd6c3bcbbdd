"""Which failures of ranks start a new group, and which would only come back."""

from __future__ import annotations

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.students.errors import group_error
from trainer.errors import ConfigError, DataError, DeadlineExceeded, Defect, InfrastructureError, StudentsLost

BROKEN_COLLECTIVE = RuntimeError("Connection closed by peer [10.77.0.14]:61147")


def raised(cause: Exception) -> BaseException:
    """As Ray hands over what a call raised in its actor."""
    text = f"Traceback (most recent call last):\n  line 3, in train\n{type(cause).__name__}: {cause}"
    return RayTaskError("call", text, cause).as_instanceof_cause()


@pytest.mark.parametrize(
    "failed",
    [
        {0: raised(BROKEN_COLLECTIVE), 1: ActorDiedError()},
        {0: raised(BROKEN_COLLECTIVE), 1: raised(BROKEN_COLLECTIVE)},
        {0: raised(ValueError("half a message")), 1: ActorDiedError()},  # of a peer that died
        {0: raised(ConnectionResetError("by peer"))},
        {0: DeadlineExceeded("no answer after 60 s"), 1: DeadlineExceeded("no answer after 60 s")},
    ],
    ids=["a rank died", "a network broke", "a rank died, oddly", "a socket broke", "all hang"],
)
def test_what_a_new_group_may_survive_is_a_lost_group(failed: dict[int, BaseException]) -> None:
    error = group_error(failed, "step 7")
    assert isinstance(error, StudentsLost)
    assert "step 7" in str(error)


def test_the_rank_that_died_is_named_before_its_peers() -> None:
    error = group_error({0: raised(BROKEN_COLLECTIVE), 1: ActorDiedError()}, "step 7")
    assert str(error).index("rank 1") < str(error).index("rank 0")


@pytest.mark.parametrize("cause", [TypeError("no len()"), KeyError("norm"), AssertionError("shape"), ValueError("nan")])
def test_a_defect_ends_the_run_at_once_with_its_traceback(cause: Exception) -> None:
    error = group_error({0: raised(BROKEN_COLLECTIVE), 1: raised(cause)}, "step 7")
    assert type(error) is Defect
    assert error.exit_code == 1
    assert str(error).startswith("step 7 failed: rank 1 ")
    assert "line 3, in train" in str(error)
    assert "\x1b" not in str(error), "no colours of Ray's"
    assert type(cause).__name__ in str(error)


@pytest.mark.parametrize(
    "cause",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64000000000 bytes."),
        MemoryError("64 GB"),
    ],
)
def test_a_rank_without_memory_is_a_matter_of_the_configuration(cause: Exception) -> None:
    error = group_error({0: raised(cause), 1: raised(BROKEN_COLLECTIVE)}, "step 7")
    assert type(error) is ConfigError
    assert "rank 0 ran out of memory" in str(error)
    assert "training.micro_batch_tokens" in str(error)


def test_an_error_meant_for_a_person_is_passed_on() -> None:
    failed = {0: raised(BROKEN_COLLECTIVE), 1: raised(DataError("train.jsonl:3: no answer"))}
    error = group_error(failed, "step 7")
    assert type(error) is DataError
    assert str(error) == "train.jsonl:3: no answer"


def test_what_nobody_foresaw_is_not_tried_again() -> None:
    error = group_error({0: RuntimeError("of this process")}, "step 7")
    assert type(error) is InfrastructureError


def test_the_allocator_says_what_is_looked_for() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    error = group_error({0: raised(caught.value)}, "step 7")
    assert type(error) is ConfigError, caught.value
