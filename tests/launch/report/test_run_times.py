"""What a run's own records say about its time: the phases of its start, its speed and its waiting."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from tiny_runs import stillhouse, tiny_run

from launch.report.run_times import read_waits, start_phases
from trainer.errors import ConfigError
from trainer.run_folder import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, so that its records are real."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {"runtime": "in_process", "student": {"ranks": 1}, "training": {"steps": 6, "depth": 1}}
    result = stillhouse("train", str(tiny_run(folder, changes)))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run"


@pytest.mark.stack
def test_the_phases_of_a_real_run_follow_each_other_up_to_its_first_step(finished: Path) -> None:
    phases = start_phases(RunFolder(finished))
    names = [phase.name for phase in phases]
    assert names[0] == "imports and checks"
    assert names[-1] == "training the first step"
    assert "starting teachers and students" in names
    assert all(phase.seconds >= 0 for phase in phases)
    for before, after in pairwise(phases):
        assert before.began_s + before.seconds == pytest.approx(after.began_s)
    shown = stillhouse("bench", "start", "--run", str(finished))
    assert shown.returncode == 0, shown.stderr
    assert "starting teachers and students" in shown.stdout


@pytest.mark.stack
def test_the_waits_of_a_real_run_have_its_depth_and_both_sides(finished: Path) -> None:
    waits = read_waits(RunFolder(finished))
    assert waits.depth == 1
    assert [share.lane for share in waits.shares] == ["student", "scorer-0"]
    assert all(0 <= share.busy <= 1 for share in waits.shares)
    assert waits.tokens_per_s > 0


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="no run folder"):
        start_phases(folder)
    with pytest.raises(ConfigError, match="too few steps"):
        read_waits(folder)
    folder.manifest.write_text('{"started": 5.0, "phases_began_s": {"imports and checks": 0.0}}')
    with pytest.raises(ConfigError, match="never came to its first step"):
        start_phases(folder)
