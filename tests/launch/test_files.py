"""What leaves this machine, or is published, out of a folder: its own files, and nothing a link leads to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.files import copy_files, files_in, row_files
from trainer.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "rows"
    (made / "more").mkdir(parents=True)
    (made / "a.jsonl").write_text("{}\n")
    (made / "more/b.parquet.gz").write_text("b")
    (tmp_path / "secret.jsonl").write_text("outside")
    return made


def names(folder: Path) -> list[str]:
    return [name for name, _ in files_in(folder, subject="prompts.path")]


def test_files_come_in_order_and_hidden_ones_stay(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("token")
    (folder / ".env").write_text("token")
    assert names(folder) == ["a.jsonl", "more/b.parquet.gz"]


@pytest.mark.parametrize("target", ["../secret.jsonl", "/etc/hostname", "..", "nowhere", "loop"])
@pytest.mark.parametrize("place", ["loop", "more/loop"])
def test_a_link_that_leads_out_or_nowhere_is_refused_by_name(folder: Path, place: str, target: str) -> None:
    (folder / place).symlink_to(target if target.startswith("/") or place == "loop" else f"../{target}")
    with pytest.raises(ConfigError, match=r"prompts\.path: .*loop is a link to .*outside of the folder"):
        names(folder)


def test_a_link_inside_the_folder_is_a_file_like_others(folder: Path) -> None:
    (folder / "again.jsonl").symlink_to("a.jsonl")
    assert names(folder) == ["a.jsonl", "again.jsonl", "more/b.parquet.gz"]


def test_only_files_that_can_hold_rows_are_rows_and_the_others_are_named(folder: Path) -> None:
    for name in ("id_rsa", "notes.docx", "README.md", "kept.CSV", "archive.gz"):
        (folder / name).write_text("x")
    chosen, left_out = row_files(folder, subject="prompts.path")
    assert [name for name, _ in chosen] == ["README.md", "a.jsonl", "kept.CSV", "more/b.parquet.gz"]
    assert left_out == ["archive.gz", "id_rsa", "notes.docx"]


@pytest.mark.parametrize(
    "name",
    [
        "credentials.json",
        "aws_credentials.csv",
        "client-secret.json",
        "token.txt",
        "hf_token.txt",
        "api_key.txt",
        "secrets/prod.json",
    ],
)
def test_rows_with_the_name_of_a_secret_are_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ConfigError, match=f"{name} has the name of a secret"):
        row_files(folder, subject="prompts.path")


@pytest.mark.parametrize("name", ["tokenized.parquet", "tokens-per-row.jsonl", "passages.jsonl", "keys.jsonl"])
def test_names_that_only_resemble_secrets_are_rows(folder: Path, name: str) -> None:
    (folder / name).write_text("x")
    assert name in [chosen for chosen, _ in row_files(folder, subject="prompts.path")[0]]


def test_named_files_and_folders_alone_are_copied(folder: Path, tmp_path: Path) -> None:
    (folder / "logs").mkdir()
    (folder / "logs/latest").symlink_to("/var/log")
    copy_files(folder, tmp_path / "copy", subject="fetch", names=["more", "absent"])
    found = sorted(os.path.relpath(file, tmp_path / "copy") for file in (tmp_path / "copy").rglob("*"))
    assert found == ["more", "more/b.parquet.gz"]
