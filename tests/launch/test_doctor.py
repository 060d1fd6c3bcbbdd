"""`stillhouse doctor` as a person types it, on this machine alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny_runs import stillhouse, tiny_run

pytestmark = pytest.mark.timeout(1000)


@pytest.fixture
def quiet(tmp_path: Path) -> dict[str, str]:
    """A home of its own, so that nobody else's token or cache is looked at."""
    return {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "RAY_ADDRESS": "", "PYTHONPATH": ""}


def test_each_line_is_ok_or_says_what_to_do(tmp_path: Path, quiet: dict[str, str]) -> None:
    result = stillhouse("doctor", **quiet)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines()[1:] if line]
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warning", "->"}
    assert "\x1b" not in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.stack  # reading models takes as long as importing transformers
def test_a_problem_gives_exit_code_1_and_what_to_do(tmp_path: Path, quiet: dict[str, str]) -> None:
    config = tiny_run(tmp_path / "run")
    result = stillhouse("doctor", str(config), **quiet)
    assert result.returncode == 0, result.stdout
    assert f"teacher model    {tmp_path}/run/teacher: " in result.stdout
    assert "memory             2 x student " in result.stdout
    assert " of this machine" in result.stdout
    weights = tmp_path / "run" / "teacher" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    shutil.rmtree(tmp_path / "run" / "student")
    token = tmp_path / "token"
    token.touch(mode=0o644)
    result = stillhouse("doctor", str(config), **quiet, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    assert result.returncode == 1, result.stdout
    assert result.stdout.strip().splitlines()[-1].startswith("3 problems")
    assert "pytorch_model.bin is a pickle" in result.stdout
    assert "there is no folder" in result.stdout
    assert f"-> chmod 600 {token}" in result.stdout


def test_a_configuration_that_cannot_be_read_gives_exit_code_2(tmp_path: Path) -> None:
    result = stillhouse("doctor", str(tmp_path / "gone.yaml"))
    assert result.returncode == 2
    assert "there is no such file" in result.stderr


def test_a_cluster_that_does_not_answer_is_one_problem(quiet: dict[str, str]) -> None:
    result = stillhouse("doctor", "--address", "127.0.0.1:1", **quiet, OMP_NUM_THREADS="1", PATH=os.environ["PATH"])
    assert result.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in result.stdout
    assert "1 problem" in result.stdout
