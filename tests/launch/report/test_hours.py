"""Hours left and device-hours, by numbers that a person can add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.jobs import pace_of
from launch.report.hours import EXPECTED, LEFT, USED, Attempt, Devices, Hours, read_attempts, spent
from trainer.loop.settings import LoopSettings
from trainer.run_folder import RunFolder

SETTINGS = LoopSettings(
    total_steps=100,
    sequences_per_step=1,
    micro_batch_tokens=1,
    depth=0,
    max_label_bytes=1,
    label_bytes_per_row=1,
    units_per_rank=1,
    max_unit_attempts=1,
    evaluate_every=0,
    save_every=0,
    max_non_finite_steps=0,
    has_held_out_rows=False,
)
BEGAN = 1000.0


def after(seconds: list[float], settings: LoopSettings = SETTINGS, **options: object) -> dict[str, float]:
    """What is said after as many steps as there are seconds."""
    now = BEGAN + 600.0  # ten minutes until the first step
    hours = Hours(settings, Devices(8, "GPU"), began=BEGAN, clock=lambda: now, **options)
    for step, value in enumerate(seconds, 1):
        now += value
        said = hours.of_step(step, {"step/seconds": value})
    return said


def test_nothing_is_said_to_be_left_before_it_is_known() -> None:
    assert set(after([60.0] * 3)) == {USED}
    said = after([60.0] * 4)
    assert said[LEFT] == 96 * 60
    assert said[USED] == pytest.approx(8 * (600 + 240) / 3600)
    assert said[EXPECTED] == pytest.approx(8 * (600 + 100 * 60) / 3600)


def test_one_slow_step_does_not_change_what_the_others_say() -> None:
    assert after([900.0, 60.0, 60.0, 60.0, 60.0])[LEFT] == 95 * 60


def test_evaluations_and_checkpoints_still_to_come_count_by_what_they_took() -> None:
    costs = {"evaluate": [30.0, 32.0, 31.0], "save": [10.0]}
    regular = replace(SETTINGS, evaluate_every=25, save_every=50, has_held_out_rows=True)
    assert after([60.0] * 10, regular, costs=costs)[LEFT] == 90 * 60 + 4 * 31 + 2 * 10
    odd = replace(regular, evaluate_every=40, save_every=0)
    assert after([60.0] * 10, odd, costs=costs)[LEFT] == 90 * 60 + 3 * 31 + 10, "40, 80, and both after the last"
    by_time = replace(SETTINGS, save_every_s=600.0)
    assert after([60.0] * 10, by_time, costs=costs)[LEFT] == 90 * 60 + (1 + 9) * 10
    assert after([60.0] * 100, regular, costs=costs)[LEFT] == 0


def test_earlier_starts_of_a_run_are_part_of_its_hours() -> None:
    earlier = [Attempt(0.0, 3600.0, 8, "GPU"), Attempt(4000.0, 5800.0, 4, "GPU")]
    said = after([60.0] * 4, earlier=earlier)
    assert said[USED] == pytest.approx(8 + 2 + 8 * 840 / 3600)
    assert said[EXPECTED] - said[USED] == pytest.approx(8 * 96 * 60 / 3600)


def test_a_start_that_was_killed_ended_with_its_last_record() -> None:
    manifest = {
        "attempts": [
            {"began": 100.0, "ended": 3700.0, "devices": 2, "kind": "GPU"},
            {"began": 5000.0, "ended": None, "devices": 2, "kind": "GPU"},
        ]
    }
    attempts = read_attempts(manifest, last_seen=6800.0)
    assert attempts[1].ended == 6800.0
    assert spent(attempts) == "1 h 30 min, 3 GPU-hours on 2 GPUs, in 2 starts"
    assert spent([Attempt(0.0, 90.0, 1, "core")]) == "1 min 30 s, 0.025 core-hours on 1 core"
    assert spent([]) == ""


def test_a_status_says_what_the_last_step_did(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    assert pace_of(folder) == ""
    attempt = {"began": 1.0, "ended": None, "devices": 2, "kind": "core"}
    folder.manifest.write_text(json.dumps({"total_steps": 9, "attempts": [attempt]}))
    first = {"kind": "step", "step": 1, USED: 0.1}
    folder.metrics.write_text(json.dumps(first) + "\n")
    assert pace_of(folder) == "", "not known yet"
    fifth = {"time": 1.0, "kind": "step", "step": 5, LEFT: 3900.0, USED: 0.5, EXPECTED: 2.66}
    event = {"time": 2.0, "kind": "event", "step": 5, "name": "note"}
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in (first, fifth, event)))
    assert pace_of(folder) == "ETA 1 h 05 min, 0.5 of 2.7 core-hours"
