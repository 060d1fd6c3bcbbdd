"""What whole runs are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs_under_fault import end_started
from tiny_runs import stillhouse, tiny_run


def pytest_runtest_teardown() -> None:
    """Not a fixture's end: runs are started by fixtures of larger scopes, too."""
    end_started()


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on Ray with two ranks."""
    config = tiny_run(tmp_path_factory.mktemp("golden"))
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    (config.parent / "said.txt").write_text(result.stdout + result.stderr)
    return config.parent / "run"
