"""Failure policies as a table, and the choice of a replica against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.lifecycle.health import (
    BACKOFF_LONGEST_S,
    Failure,
    FailurePolicy,
    GiveUp,
    ReplicaLoad,
    RestartGroup,
    RestartReplica,
    RetryUnit,
    backoff_s,
    choose_replica,
)
from configs.schema import Faults

POLICY = FailurePolicy(max_restarts=3, max_attempts=5, max_refusals=2)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (Failure("students_lost", 1), RestartGroup(0.0)),
        (Failure("students_lost", 3), RestartGroup(2.0)),
        (Failure("students_lost", 9, progress_since_last=True), RestartGroup(0.0)),
        (Failure("teacher_died", 1), RestartReplica(1.0, 1)),
        (Failure("teacher_hung", 3), RestartReplica(4.0, 3)),
        (Failure("teacher_died", 8, progress_since_last=True), RestartReplica(1.0, 1)),
        (Failure("unit_failed", 1), RetryUnit(1.0)),
        (Failure("unit_failed", 4), RetryUnit(8.0)),
        (Failure("unit_refused", 1), RetryUnit(0.0)),
    ],
)
def test_a_failure_within_its_budget_is_mended(failure: Failure, expected: object) -> None:
    assert POLICY.decide(failure) == expected


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (Failure("students_lost", 4), "4 times without a new step or checkpoint"),
        (Failure("teacher_died", 4), "without scoring a unit"),
        (Failure("unit_failed", 5), "5 attempts"),
        (Failure("unit_refused", 2), "2 attempts"),
    ],
)
def test_a_failure_past_its_budget_ends_with_a_reason(failure: Failure, words: str) -> None:
    decision = POLICY.decide(failure)
    assert isinstance(decision, GiveUp)
    assert words in decision.reason


def test_no_restarts_means_the_first_failure_ends_the_run() -> None:
    assert isinstance(
        FailurePolicy(max_restarts=0).decide(Failure("students_lost", 1, progress_since_last=True)), GiveUp
    )


def test_the_budgets_come_from_the_configuration() -> None:
    faults = Faults(max_student_restarts=1, max_teacher_restarts=7, max_unit_attempts=4)
    assert FailurePolicy.of_students(faults).max_restarts == 1
    assert FailurePolicy.of_teachers(faults).max_restarts == 7
    assert FailurePolicy.of_teachers(faults).max_attempts == 4


@given(st.integers(1, 10_000))
def test_waits_grow_and_stay_within_one_and_thirty_seconds(count: int) -> None:
    assert 1.0 <= backoff_s(count) <= backoff_s(count + 1) <= BACKOFF_LONGEST_S


@given(
    st.sampled_from(["students_lost", "teacher_died", "teacher_hung", "unit_failed", "unit_refused"]),
    st.integers(1, 40),
    st.integers(0, 20),
)
def test_a_failure_that_repeats_without_progress_ends(kind: str, attempts: int, restarts: int) -> None:
    policy = FailurePolicy(max_restarts=restarts, max_attempts=attempts, max_refusals=attempts)
    ends = [isinstance(policy.decide(Failure(kind, count)), GiveUp) for count in range(1, 42)]
    first = ends.index(True)
    assert all(ends[first:])
    assert first == (attempts - 1 if kind.startswith("unit") else restarts)


LOADS = st.lists(
    st.builds(
        ReplicaLoad,
        name=st.sampled_from("abcdef"),
        tokens_in_flight=st.integers(0, 5),
        units_in_flight=st.integers(0, 3),
        healthy=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda load: load.name,
)


@given(LOADS, st.integers(1, 3), st.sets(st.sampled_from("abcdef")))
def test_the_chosen_replica_is_the_least_loaded_one_that_may_take_a_unit(
    loads: list[ReplicaLoad], credits: int, exclude: set[str]
) -> None:
    chosen = choose_replica(loads, credits=credits, exclude=exclude)
    able = {x.name: x for x in loads if x.healthy and x.units_in_flight < credits and x.name not in exclude}
    if not able:
        assert chosen is None
    else:
        assert able[chosen].tokens_in_flight == min(x.tokens_in_flight for x in able.values())


def test_a_tie_goes_to_the_first_replica() -> None:
    assert choose_replica([ReplicaLoad("a", 0, 0), ReplicaLoad("b", 0, 0)], credits=2) == "a"
    assert choose_replica([ReplicaLoad("a", 9, 1), ReplicaLoad("b", 3, 1)], credits=2) == "b"
    assert choose_replica([ReplicaLoad("a", 9, 1), ReplicaLoad("b", 3, 2)], credits=2) == "a"
