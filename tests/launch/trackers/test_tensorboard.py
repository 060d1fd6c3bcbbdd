"""TensorBoard's own reader finds what was logged, and of a run that went on every step once."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from configs.trackers import TRACKERS
from launch.trackers.protocol import Point, RunFacts

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_the_event_files_hold_each_step_once_also_after_a_resume(tmp_path: Path) -> None:
    tracker = TRACKERS.load(TRACKERS.validate("tensorboard"))
    facts = RunFacts("tiny-1", "tiny", tmp_path)
    first = tracker.begin(facts)
    assert first.rewind(-1)
    first.log([Point("step", step, 100.0 + step, {"train/loss": float(step)}) for step in (1, 2, 3)])
    first.log([Point("evaluation", 3, 103.5, {"evaluation/forward_kl": 0.25})])
    first.close(None)
    second = tracker.begin(facts)
    assert second.rewind(2)
    second.log([Point("step", 3, 200.0, {"train/loss": 30.0})])
    second.close(None)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value, event.wall_time) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0, 101.0), (2, 2.0, 102.0), (3, 30.0, 200.0)]


def test_a_folder_that_cannot_be_made_is_told_by_check(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for folder, refused in ((tmp_path / "new" / "one", False), (tmp_path / "taken" / "one", True)):
        tracker = TRACKERS.load(TRACKERS.validate({"kind": "tensorboard", "folder": str(folder)}))
        with pytest.raises(OSError, match="is a file") if refused else nullcontext():
            tracker.reach()
        assert not folder.exists(), "it is only looked at"
