"""What student ranks do in tests of `tests/trainer/model/test_features.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rank_processes import Place
from student_world import Teacher, build, make_run, train

from configs.schema import Run

WIDE = {"hidden_size": 96}
"""The teacher's states are wider than the student's."""

LABELS = {"kind": "hidden", "layers": [0, 1, 2]}
OBJECTIVE = [
    {"loss": "forward_kl"},
    {"loss": "features", "student_layer": 1, "teacher_layer": 1, "projector": "linear", "weight": 0.5},
    {"loss": "features", "student_layer": 0, "teacher_layer": 2, "projector": "linear", "distance": "cosine"},
    {"loss": "features", "student_layer": 2, "teacher_layer": 0, "projector": "linear", "distance": "ce"},
]


class WideTeacher(Teacher):
    """`WIDE`, by transformers."""

    def __init__(self) -> None:
        super().__init__(seed=1, **WIDE)


def feature_run(folder: Path, **student: Any) -> Run:
    teacher = {"model": {"path": str(folder / "wide")}}
    return make_run(folder, student=student, teacher=teacher, labels=LABELS, objective=OBJECTIVE)


def case_steps(place: Place) -> dict[Any, Any]:
    """Four steps in one micro-batch and in several, with activation checkpointing or not; and two, a checkpoint, new
    ranks, two."""
    found: dict[Any, Any] = {}
    settings = ((1, False, 4096), (2, False, 48), (3, True, 48)) if place.world == 2 else ((2, True, 48),)
    for zero_stage, checkpointing, budget in settings:
        run = feature_run(place.folder.parent, zero_stage=zero_stage, activation_checkpointing=checkpointing)
        folder = place.folder / f"checkpoint-{zero_stage}"
        folder.mkdir(exist_ok=True)
        rank, options = build(run, place), {"token_budget": budget, "teacher": WideTeacher()}
        once = train(rank, run, place, last=2, **options)
        rank.save(2, folder)
        once += train(rank, run, place, first=3, last=4, **options)
        rank.export(place.folder / f"once-{zero_stage}")
        rank.close()
        rank = build(run, place)
        step = rank.load(folder)
        resumed = train(rank, run, place, first=step + 1, last=4, **options)
        rank.export(place.folder / f"resumed-{zero_stage}")
        rank.close()
        exports = [place.folder / f"{name}-{zero_stage}" for name in ("once", "resumed")]
        found[zero_stage, checkpointing, budget] = (once, resumed, exports)
    return found
