"""The hash of the code: the same for the same files anywhere, another one after any change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.build import PACKAGES, VARIABLE, build_hash, check_build
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def hash_of(folder: Path) -> str:
    """As a process with this folder first on its path sees it."""
    code = "from trainer.build import build_hash; print(build_hash())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_a_copy_elsewhere_has_the_same_hash_and_a_changed_file_another(copy: Path) -> None:
    first = hash_of(copy)
    (copy / "cluster" / "notes.txt").write_text("no code")
    assert hash_of(copy) == first
    template = next((copy / "launch").rglob("*.jinja"))
    template.write_text(template.read_text() + " ")
    assert hash_of(copy) != first


def test_a_renamed_file_changes_the_hash(copy: Path) -> None:
    first = hash_of(copy)
    (copy / "launch" / "show.py").rename(copy / "launch" / "shows.py")
    assert hash_of(copy) != first


def test_a_process_with_other_code_than_its_controller_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    check_build()
    monkeypatch.setenv(VARIABLE, build_hash())
    check_build()
    monkeypatch.setenv(VARIABLE, "0123456789abcdef")
    with pytest.raises(ConfigError, match=r"another version of Stillhouse.*the controller's 0123456789abcdef"):
        check_build()
