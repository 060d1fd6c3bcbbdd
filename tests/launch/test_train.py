"""What ends a run from outside of its own code, and how it is told."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from launch.train import disk_trouble

RUN = Path("/runs/mine")


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", str(RUN / "rejected.jsonl")),
        FileNotFoundError(errno.ENOENT, "No such file or directory", str(RUN / "checkpoints" / ".step_000004.tmp-1")),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error", "/data/train.jsonl"),
        OSError(errno.ESTALE, "Stale file handle"),
    ],
)
def test_a_disk_that_fails_is_told_as_such(error: OSError) -> None:
    text = disk_trouble(error, RUN)
    assert text is not None
    assert str(RUN) in text
    assert str(error) in text


@pytest.mark.parametrize(
    "error",
    [
        TypeError("unsupported operand"),
        TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/runs/mine-too/plugin.py"),
    ],
)
def test_a_mistake_in_the_code_is_not_blamed_on_a_disk(error: Exception) -> None:
    assert disk_trouble(error, RUN) is None
