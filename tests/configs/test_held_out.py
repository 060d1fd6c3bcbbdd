"""Which tasks are evaluated on which rows, and what is said of held-out rows that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from configs.held_out import held_out_sets
from configs.rules import held_out_by_place
from configs.schema import Run
from configs.tasks import Route

TEACHERS = {name: {"model": {"path": f"owner/{name}"}} for name in ("big", "code")}
SFT = {"labels": "none", "objective": [{"loss": "cross_entropy"}]}


def run(**changes: Any) -> Run:
    fields: dict[str, Any] = {
        "name": "a",
        "student": {"model": {"path": "owner/small"}},
        "prompts": {"path": "rows"},
        "data": {"evaluation": {"path": "held"}},
        "training": {"steps": 1},
    }
    return Run.model_validate(fields | changes)


def sets(of: Run) -> dict[str, tuple[str, str, bool]]:
    """By name: the rows, the task by which they are read, and whether they are scored."""
    return {name: (one.rows.path, one.task.name, one.is_scored) for name, one in held_out_sets(of).items()}


def test_a_run_with_one_task_has_one_set_and_a_run_without_held_out_rows_none() -> None:
    teacher = {"model": {"path": "owner/big"}}
    assert sets(run(teacher=teacher)) == {"main": ("held", "main", True)}
    assert sets(run(teacher=teacher, data={})) == {}
    assert sets(run(**SFT)) == {"main": ("held", "main", False)}


def test_tasks_with_rows_and_teacher_in_common_are_evaluated_once() -> None:
    tasks = {
        "write": {"teacher": "big", "answers": "teacher", **SFT},
        "chat": {"teacher": "big"},
        "skew": {"teacher": "big", "labels": "hidden"},
        "code": {"teacher": "code"},
        "own": {"teacher": "code", "evaluation": {"path": "own"}},
        "sft": SFT,
    }
    teachers = {**TEACHERS, "big": {**TEACHERS["big"], "generator": {}}}
    several = run(teachers=teachers, tasks=tasks)
    assert sets(several) == {
        "write+chat+skew": ("held", "chat", True),
        "code": ("held", "code", True),
        "own": ("own", "own", True),
        "sft": ("held", "sft", False),
    }
    places = {place: rows.path for place, rows in held_out_by_place(several).items()}
    assert places == {"data.evaluation": "held", "tasks.own.evaluation": "own"}


def test_tasks_that_route_unlike_are_evaluated_each() -> None:
    route = Route(column="domain", map={"python": "code", "prose": "big"}).model_dump()
    other = {**route, "map": {"python": "big", "prose": "code"}}
    several = run(teachers=TEACHERS, tasks={"a": {"route": route}, "b": {"route": route}, "c": {"route": other}})
    assert list(sets(several)) == ["a+b", "c"]


def test_held_out_rows_of_a_task_need_answers_and_are_enough_to_evaluate_on() -> None:
    tasks = {"chat": {"teacher": "big", "evaluation": {"path": "own", "format": "prompt"}}, "code": {"teacher": "code"}}
    with pytest.raises(ValueError, match="held-out rows need answers: name another format"):
        run(teachers=TEACHERS, tasks=tasks)
    tasks["chat"]["evaluation"] = {"path": "own"}
    every = {"steps": 4, "evaluate_every": 2}
    assert sets(run(teachers=TEACHERS, tasks=tasks, data={}, training=every)) == {"chat": ("own", "chat", True)}
    del tasks["chat"]["evaluation"]
    with pytest.raises(ValueError, match="there is nothing to evaluate on"):
        run(teachers=TEACHERS, tasks=tasks, data={}, training=every)
