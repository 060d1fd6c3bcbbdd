"""Commit, verification, retention and the ways a checkpoint can be damaged."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.checkpoint import MANIFEST, Checkpoints, TrainingState
from trainer.errors import ConfigError
from trainer.types import Cursor, StreamCounters


def state(step: int, config_hash: str = "a") -> TrainingState:
    return TrainingState(
        step=step,
        cursor=Cursor(epoch=1, position=step * 4, seed=3, counters=StreamCounters(read=step * 4, rejected=1)),
        config_hash=config_hash,
        world=2,
        non_finite_steps=0,
    )


def save(checkpoints: Checkpoints, step: int, content: bytes = b"shard") -> Path:
    temporary = checkpoints.begin(step)
    (temporary / "rank0").mkdir()
    (temporary / "rank0" / "shard.pt").write_bytes(content * 100)
    return checkpoints.commit(temporary, state(step))


def test_the_newest_commit_is_found_with_its_state(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (5, 10, 15):
        save(checkpoints, step)
    found = checkpoints.latest(config_hash="a")
    assert found is not None
    assert found.state == state(15)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step_000010", "step_000015"]


def test_an_uncommitted_folder_does_not_exist(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    temporary = checkpoints.begin(10)
    (temporary / "shard.pt").write_bytes(b"half")
    found = checkpoints.latest(config_hash="a")
    assert found is not None
    assert found.state.step == 5
    checkpoints.sweep()
    assert not temporary.exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest_cut", "manifest_gone"])
def test_a_damaged_checkpoint_is_skipped_by_name_and_the_older_one_used(tmp_path: Path, damage: str) -> None:
    notes: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=3, note=notes.append)
    save(checkpoints, 5)
    newest = save(checkpoints, 10)
    shard = newest / "rank0" / "shard.pt"
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "flip":
        shard.write_bytes(b"S" + shard.read_bytes()[1:])
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest_cut":
        (newest / MANIFEST).write_text((newest / MANIFEST).read_text()[:40])
    else:
        (newest / MANIFEST).unlink()
    found = checkpoints.latest(config_hash="a")
    assert found is not None
    assert found.state.step == 5
    assert len(notes) == 1
    assert "step 10" in notes[0]


def test_another_configuration_is_refused_with_both_hashes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    with pytest.raises(ConfigError, match=r"hash a, this one is b"):
        checkpoints.latest(config_hash="b")


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "missing", keep=1).latest(config_hash="a") is None


@pytest.mark.parametrize("name", ["../../other/shard.pt", "/tmp/shard.pt", "rank0/../../step_000005/rank0/shard.pt"])
def test_a_manifest_that_names_a_path_outside_of_its_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    save(checkpoints, 5)
    newest = save(checkpoints, 10)
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["rank0/shard.pt"]
    (newest / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"outside of the checkpoint; it was not written by a run"):
        checkpoints.latest(config_hash="a")


@pytest.mark.parametrize("what", ["shard", "folder", "checkpoint", "all"])
def test_a_link_out_of_the_run_folder_is_refused(tmp_path: Path, what: str) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    newest = save(checkpoints, 10)
    places = {"shard": newest / "rank0" / "shard.pt", "folder": newest / "rank0", "checkpoint": newest}
    place = places.get(what, tmp_path / "c")
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link"):
        checkpoints.latest(config_hash="a")


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    newest = save(checkpoints, 10)
    (newest / "rank0" / ".nfs0001").write_bytes(b"")
    assert checkpoints.latest(config_hash="a") is not None
    (newest / "rank0" / "more.pt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ConfigError, match=r"more.pt is not listed in"):
        checkpoints.latest(config_hash="a")


def test_a_disk_without_room_for_another_checkpoint_is_found_before_anybody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=400))
    save(checkpoints, 5)  # nothing is known of its size yet
    with pytest.raises(OSError, match="are free"):
        checkpoints.begin(10)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step_000005"]


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    checkpoints = Checkpoints(tmp_path / "c", keep=1, note=notes.append)
    save(checkpoints, 5)

    def not_empty(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", not_empty)
    save(checkpoints, 10)
    found = checkpoints.latest(config_hash="a")
    assert found is not None
    assert found.state.step == 10
    assert "step 5 could not be removed" in notes[0]
