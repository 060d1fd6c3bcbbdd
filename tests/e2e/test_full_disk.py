"""A disk that fills up in the middle of a run: a real one of a few megabytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import tiny_run

from trainer.errors import InfrastructureError

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]

FILL = """
mount -t tmpfs -o size=12m tmpfs "$1"
( until [ -e "$1/checkpoints/step_000002" ]; do sleep 0.02; done
  dd if=/dev/zero of="$1/filler" bs=4k 2>/dev/null ) &
"$2" -m launch train "$3"
code=$?
wait
ls "$1/checkpoints" > "$4"
exit $code
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_ends_the_run_at_the_third_checkpoint_with_the_reason_and_keeps_the_old_ones(
    tmp_path: Path,
) -> None:
    changes = {"runtime": "in_process", "student": {"ranks": 1}, "training": {"save_every": 2, "steps": 400}}
    config = tiny_run(tmp_path, changes)
    run, kept = tmp_path / "run", tmp_path / "kept"
    run.mkdir()
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", FILL, "sh"]
    arguments = [str(run), sys.executable, str(config), str(kept)]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    if "mount" in result.stderr and not result.stdout:
        pytest.skip(f"no disk can be mounted here: {result.stderr.splitlines()[0]}")
    assert result.returncode == InfrastructureError.exit_code, result.stdout + result.stderr
    failed = [line for line in result.stdout.splitlines() if line.startswith("the checkpoint of step")]
    assert len(failed) == 3, result.stdout
    last = failed[-1].split()[4]
    assert f"error: the checkpoint of step {last} could not be written: [Errno 28]" in result.stderr
    assert "Traceback" not in result.stderr
    assert f"step_{int(last) - 6:06d}" in kept.read_text().split(), "the newest that could be written is still there"
