"""The last words of a run, where the disk does not take them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.record import Record
from launch.report.metrics import MetricsLog
from trainer.errors import InfrastructureError
from trainer.run_folder import RunFolder
from trainer.types import StepMetrics


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a run that logged a step."""
    folder = RunFolder.create(tmp_path / "run")
    log = MetricsLog(folder)
    log.step(StepMetrics(1, {"train/loss": 1.0}))
    log.close()
    return folder


def test_a_run_that_came_to_its_end_has_ended_well_also_without_a_report(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.report.mkdir()  # nothing can be written in its place, as on a full disk
    Record(folder).ended(0, "finished")
    ending = folder.ending()
    assert ending is not None
    assert ending.code == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: the report cannot be written: ")
    assert f"stillhouse report {folder.path}" in said


def test_an_end_that_cannot_be_noted_is_told_and_a_bad_one_keeps_its_own_error(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.exit.mkdir()
    with pytest.raises(InfrastructureError, match=r"trained to its end, but .*exit\.json cannot be written"):
        Record(folder).ended(0, "finished")
    Record(folder).ended(3, "a row is wrong")
    assert "exit.json cannot be written" in capsys.readouterr().err
    assert folder.report.is_file()
