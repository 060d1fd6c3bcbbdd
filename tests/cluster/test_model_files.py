"""Copies of a model on a node's disk, and what tells two model folders apart."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest

from cluster import model_files
from cluster.model_files import ModelFiles, find_folder, local_copy
from trainer.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text('{"layers": 2}')
    (folder / "model.safetensors").write_bytes(b"w" * 5000)
    (folder / ".hidden").write_text("not part of it")
    return folder


def test_equal_folders_are_equal_and_every_difference_is_named(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((model / name).read_bytes())
    here = ModelFiles.of(model)
    assert here.weight_bytes == 5000
    assert here.difference(ModelFiles.of(other)) is None
    assert here == pickle.loads(pickle.dumps(here))
    (other / "config.json").write_text('{"layers": 3}')
    assert here.difference(ModelFiles.of(other)) == "config.json has another content"
    (other / "config.json").write_text('{"layers": 2}')
    (other / "model.safetensors").write_bytes(b"v" * 5000)
    assert here.difference(ModelFiles.of(other)) is None
    read, theirs = ModelFiles.with_contents(model), ModelFiles.with_contents(other)
    assert read.difference(theirs) == "model.safetensors has another content"
    assert read == pickle.loads(pickle.dumps(read))
    assert read.short_hash != theirs.short_hash
    (other / "config.json").write_text('{"layers": 3}')
    (other / "model.safetensors").write_bytes(b"w" * 4000)
    assert "config.json" not in here.difference(ModelFiles.of(other))
    assert here.difference(ModelFiles.of(other)) == "model.safetensors has 4000 bytes, here 5000"
    (other / "model.safetensors").unlink()
    assert here.difference(ModelFiles.of(other)) == "model.safetensors is missing"


def test_hub_caches_are_compared_by_commit() -> None:
    mine = ModelFiles((("config.json", 5),), "aa", "1" * 40)
    assert mine.difference(ModelFiles((), "", "1" * 40)) is None
    assert mine.difference(ModelFiles(mine.files, "aa", "2" * 40)) == f"revision {'2' * 12}, here {'1' * 12}"


def test_a_folder_is_found_and_an_unknown_name_is_not(model: Path) -> None:
    assert find_folder(str(model), None) == model
    assert find_folder("nobody/has-this-model", None) is None
    assert find_folder("no such / name", None) is None


def test_a_model_is_copied_once_whoever_comes_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Path] = []
    real = model_files.shutil.copyfile

    def counted(source: Path, target: Path) -> None:
        copies.append(source)
        real(source, target)

    monkeypatch.setattr(model_files.shutil, "copyfile", counted)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(local_copy(str(model), tmp_path / "disk", timeout_s=30)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 6
    assert len(copies) == 2
    assert ModelFiles.of(found[0]) == ModelFiles.of(model)
    assert [path.name for path in (tmp_path / "disk").iterdir() if not path.name.startswith(".")] == [found[0].name]


def test_a_changed_model_is_copied_anew_and_a_damaged_copy_is_named(model: Path, tmp_path: Path) -> None:
    first = local_copy(str(model), tmp_path / "disk", timeout_s=30)
    (model / "config.json").write_text('{"layers": 7}')
    second = local_copy(str(model), tmp_path / "disk", timeout_s=30)
    (model / "model.safetensors").write_bytes(b"v" * 5000)  # trained further: the same names and sizes
    third = local_copy(str(model), tmp_path / "disk", timeout_s=30)
    assert len({first, second, third}) == 3
    assert (third / "model.safetensors").read_bytes() == b"v" * 5000
    (model / "model.safetensors").write_bytes(b"w" * 5000)
    (second / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"no longer a copy of .*model.safetensors has 4 bytes, here 5000. Delete it"):
        local_copy(str(model), tmp_path / "disk", timeout_s=30)


def test_what_cannot_be_copied_says_why_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="only a model that is a folder can be copied"):
        local_copy("org/model", tmp_path / "disk", timeout_s=30)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"has 0.0 GB, and node .* has 0.0 GB free"):
        local_copy(str(model), tmp_path / "disk", timeout_s=30)
    monkeypatch.undo()

    def broken(source: Path, target: Path) -> None:
        target.write_bytes(b"")
        if source.name == "model.safetensors":
            raise OSError("the disk is gone")

    monkeypatch.setattr(model_files.shutil, "copyfile", broken)
    with pytest.raises(ConfigError, match="the disk is gone"):
        local_copy(str(model), tmp_path / "disk", timeout_s=30)
    assert [path for path in (tmp_path / "disk").iterdir() if not path.name.endswith(".lock")] == []
