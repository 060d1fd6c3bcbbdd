"""`stillhouse report`: make report.html again from what a run folder holds."""

from __future__ import annotations

from pathlib import Path

from launch.report.page import write_report
from trainer.run_folder import RunFolder


def report(run_folder: Path) -> None:
    """Write `<run>/report.html` and print where it is. Raises ConfigError where there is no run."""
    print(write_report(RunFolder(run_folder)))
