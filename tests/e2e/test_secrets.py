"""Secrets in the environment of a run reach neither its folder nor the terminal, Ray's logs or a command line."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from runs_under_fault import finish, start
from tiny_runs import tiny_run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1200)]

PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlanted01",
    "WANDB_API_KEY": "planted-wandb-02-" + "b" * 24,
    "RAY_AUTH_TOKEN": "03c0ffee" * 8,
    "AWS_SECRET_ACCESS_KEY": "planted/aws+04" + "d" * 26,
    "STORE_PASSWORD": "planted-store-05",
    "HTTPS_PROXY": "http://planted-user-06:planted-password-06@127.0.0.1:9",
}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For Ray's sockets, whose paths are short."""
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as name:
        yield Path(name)


def keep(sessions: Path, kept: Path) -> None:
    """Hard links to every log of Ray's sessions: they outlive the folder, and grow with the file."""
    for file in sessions.glob("stillhouse-*/r/session_*/logs/**/*"):
        link = kept / str(file.relative_to(sessions)).replace("/", "_")
        if file.is_file() and not file.is_symlink() and not link.exists():
            try:
                os.link(file, link)
            except FileNotFoundError:
                continue


def holders(folder: Path) -> list[str]:
    """`file: NAME` for each planted secret that a file of the folder holds."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            found += [f"{file}: {name}" for name, secret in PLANTED.items() if secret.encode() in content]
    return found


def test_a_planted_secret_is_nowhere_to_be_found(
    tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"training": {"steps": 4, "save_every": 2}, "trackers": ["tensorboard"]}
    config = tiny_run(tmp_path / "place", changes)
    kept = short_folder / "kept"
    kept.mkdir()
    for name, secret in PLANTED.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("TMPDIR", str(short_folder))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    before = set(psutil.pids())
    process = start(config)
    on_command_lines: set[str] = set()
    while process.poll() is None:
        keep(short_folder, kept)
        for pid in set(psutil.pids()) - before:
            try:
                line = " ".join(psutil.Process(pid).cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            on_command_lines |= {f"{name} in {line}" for name, secret in PLANTED.items() if secret in line}
        time.sleep(0.3)
    code, output = finish(process)
    assert code == 0, output
    assert not [name for name, secret in PLANTED.items() if secret in output]
    assert on_command_lines == set()
    assert holders(tmp_path / "place" / "run") == []
    logs = [file.name for file in kept.iterdir()]
    assert any("raylet" in name for name in logs), logs
    assert any("worker" in name for name in logs), logs
    assert holders(kept) == []
    (tmp_path / "place" / "run" / "control.txt").write_text(PLANTED["STORE_PASSWORD"])
    assert len(holders(tmp_path / "place" / "run")) == 1, "the search finds what is there"


def test_a_password_in_a_data_path_is_refused_and_shown_nowhere(tmp_path: Path) -> None:
    url = "https://reader:planted-password-07@data.example.org/rows.jsonl"
    config = tiny_run(tmp_path / "place", {"prompts": {"path": url}})
    process = start(config)
    code, output = finish(process)
    assert code == 2, output
    assert "prompts.path" in output
    assert "planted-password-07" not in output
    assert not (tmp_path / "place" / "run").exists()
