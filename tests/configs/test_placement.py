"""Where roles may sit, as configurations say it: what holds together, and what a run's hash leaves out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from configs.load import config_hash
from configs.schema import Run


def run(*, generator: bool = False, **changes: Any) -> Run:
    tree: dict[str, Any] = {
        "name": "placed",
        "student": {"model": {"path": "models/student"}, "ranks": 4},
        "teacher": {"model": {"path": "models/teacher"}, "scorer": {"replicas": 2}},
        "prompts": {"path": "rows.jsonl"},
        "training": {"steps": 10},
    }
    if generator:
        tree["teacher"]["generator"] = {}
        tree["answers"] = {"kind": "teacher", "max_new_tokens": 8}
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = tree
        for key in parents:
            section = section[key]
        section[last] = value
    return Run.model_validate(tree)


def test_a_placement_is_read_for_every_role() -> None:
    seats = {"strategy": "spread", "accelerator_type": "H100", "node_labels": {"pool": "a", "ray.io/zone": "z-1"}}
    placed = run(student__placement={**seats, "nodes": 2}, teacher__scorer__placement=seats)
    assert placed.student.placement.nodes == 2
    assert placed.teacher.scorer.placement.node_labels == {"pool": "a", "ray.io/zone": "z-1"}
    assert run().student.placement.strategy == "pack"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student__placement": {"nodes": 5}}, "every node needs one: write at most 4"),
        ({"student__placement": {"nodes": 0}}, "greater than 0"),
        ({"student__placement": {"strategy": "strict_pack", "nodes": 2}}, "write nodes: 1"),
        ({"student__placement": {"strategy": "strict_spread", "nodes": 2}}, "write nodes: 4"),
        ({"teacher__scorer__placement": {"nodes": 3}}, "write at most 2"),
        ({"teacher__scorer": {"may_span_nodes": True, "placement": {"nodes": 1}}}, "remove one of the two"),
        ({"student__placement": {"node_labels": {"a b": "c"}}}, "match pattern"),
        ({"student__placement": {"node_labels": {"pool": "!a"}}}, "match pattern"),
        ({"student__placement": {"stratgy": "pack"}}, "Extra inputs"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        run(**changes)


def test_where_a_run_runs_is_no_part_of_what_it_learns() -> None:
    here = run(generator=True)
    elsewhere = run(
        generator=True,
        student__placement={"strategy": "spread"},
        teacher__scorer={"replicas": 2, "may_span_nodes": True, "placement": {"node_labels": {"pool": "a"}}},
        teacher__generator={"placement": {"strategy": "spread"}},
        teacher__model={"path": "models/teacher", "local_copy": "scratch"},
    )
    assert config_hash(here) == config_hash(elsewhere)
    changed = [run(generator=True, seed=1), run(generator=True, student__ranks=2), run()]
    hashes = [config_hash(one) for one in (here, *changed)]
    assert all(a != b for a, b in itertools.combinations(hashes, 2))
