"""Commit, verification, retention and the ways a checkpoint can be damaged."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.loop.checkpoint import Checkpoints
from trainer.loop.manifest import MANIFEST, Damaged, TrainingState, digest_of, read_manifest
from trainer.types import Cursor, StreamCounters


def state(step: int, config_hash: str = "a") -> TrainingState:
    return TrainingState(
        step=step,
        cursor=Cursor(epoch=1, position=step * 4, seed=3, counters=StreamCounters(read=step * 4, rejected=1)),
        config_hash=config_hash,
        world=2,
        non_finite_steps=0,
    )


SHARD = "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt"
FILES = (  # what two ranks write at ZeRO-1 and 2
    "rank_0.pt",
    "rank_1.pt",
    "zero/mp_rank_00_model_states.pt",
    SHARD,
    "zero/zero_pp_rank_1_mp_rank_00_optim_states.pt",
)


def write(folder: Path) -> None:
    (folder / "zero").mkdir()
    for name in FILES:
        (folder / name).write_bytes(name.encode() * 100)


def save(checkpoints: Checkpoints, step: int) -> Path:
    temporary = checkpoints.begin(step)
    write(temporary)
    return checkpoints.commit(temporary, state(step))


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest whose digest is right, as somebody would who wants it to be believed."""
    content = {key: value for key, value in manifest.items() if key != "blake2b"}
    (folder / MANIFEST).write_text(json.dumps({**content, "blake2b": digest_of(content)}))


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


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest_cut", "manifest_gone", "renamed"])
def test_a_damaged_checkpoint_is_skipped_by_name_and_the_older_one_used(tmp_path: Path, damage: str) -> None:
    notes: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=3, note=notes.append)
    save(checkpoints, 5)
    newest = save(checkpoints, 10)
    shard = newest / SHARD
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "flip":
        shard.write_bytes(b"S" + shard.read_bytes()[1:])
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest_cut":
        (newest / MANIFEST).write_text((newest / MANIFEST).read_text()[:40])
    elif damage == "renamed":
        newest.rename(newest.with_name("step_000011"))
    else:
        (newest / MANIFEST).unlink()
    found = checkpoints.latest(config_hash="a")
    assert found is not None
    assert found.state.step == 5
    assert len(notes) == 1
    assert "step 1" in notes[0]
    assert str(tmp_path) in notes[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["state"].update(step=11),
        lambda manifest: manifest["state"]["cursor"].update(position=41),
        lambda manifest: manifest["state"]["cursor"].update(epoch=2),
        lambda manifest: manifest["state"]["cursor"]["counters"].update(read=41),
        lambda manifest: manifest["state"].update(world=1),
        lambda manifest: manifest["state"].update(non_finite_steps=1),
        lambda manifest: manifest.update(format=99),
        lambda manifest: manifest.update(files={}),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(state=None),
        lambda manifest: manifest["files"].pop(SHARD),
        lambda manifest: manifest.pop("blake2b"),
        lambda manifest: manifest.update(blake2b=None),
    ],
)
def test_a_manifest_that_was_changed_is_damage_and_the_older_checkpoint_is_used(tmp_path: Path, change: Any) -> None:
    notes: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=3, note=notes.append)
    save(checkpoints, 5)
    path = save(checkpoints, 10) / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest, indent=2))
    found = checkpoints.latest(config_hash="a")
    assert found is not None
    assert found.state.step == 10, "the same content in other spaces is the same"
    change(manifest)
    path.write_text(json.dumps(manifest))
    found = checkpoints.latest(config_hash="a")
    assert found is not None
    assert found.state == state(5)
    assert notes[0].startswith(f"checkpoint of step 10 is damaged and skipped: {path}"), notes


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"blake2b"', '{"blake2b": {}}', "[" * 100_000, "\ud800", "\0"])
def test_a_manifest_of_any_other_shape_is_damage(tmp_path: Path, text: str) -> None:
    notes: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=3, note=notes.append)
    path = save(checkpoints, 10) / MANIFEST
    path.write_bytes(text.encode(errors="surrogatepass"))
    assert checkpoints.latest(config_hash="a") is None
    assert len(notes) == 1
    assert str(path) in notes[0]


def test_no_single_character_of_a_manifest_can_change_what_is_resumed(tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path, keep=3), 10)
    text = (folder / MANIFEST).read_text()
    for place in range(len(text)):
        for other in "07,":
            (folder / MANIFEST).write_text(text[:place] + other + text[place + 1 :])
            with contextlib.suppress(Damaged):
                assert read_manifest(folder).state == state(10), (place, other)


def test_another_version_of_the_format_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    folder = save(checkpoints, 10)
    seal(folder, {**json.loads((folder / MANIFEST).read_text()), "format": 99})
    with pytest.raises(ConfigError, match=r"has the format 99, this version of Stillhouse reads 2"):
        checkpoints.latest(config_hash="a")


@pytest.mark.parametrize("missing", FILES)
def test_a_checkpoint_that_lacks_a_file_of_any_rank_is_not_committed(tmp_path: Path, missing: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    temporary = checkpoints.begin(10)
    write(temporary)
    (temporary / missing).unlink()
    with pytest.raises(OSError, match="the ranks wrote no"):
        checkpoints.commit(temporary, state(10))
    assert checkpoints.latest(config_hash="a") is None


def test_another_configuration_is_refused_with_both_hashes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    with pytest.raises(ConfigError, match=r"hash a, this one is b"):
        checkpoints.latest(config_hash="b")


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "missing", keep=1).latest(config_hash="a") is None


@pytest.mark.parametrize("name", ["../../other/shard.pt", "/tmp/shard.pt", "zero/../../step_000005/rank_0.pt"])
def test_a_manifest_that_names_a_path_outside_of_its_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    save(checkpoints, 5)
    newest = save(checkpoints, 10)
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"][SHARD]
    seal(newest, manifest)
    with pytest.raises(ConfigError, match=r"outside of the checkpoint; it was not written by a run"):
        checkpoints.latest(config_hash="a")


@pytest.mark.parametrize("what", ["shard", "folder", "checkpoint", "all"])
def test_a_link_out_of_the_run_folder_is_refused(tmp_path: Path, what: str) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    newest = save(checkpoints, 10)
    places = {"shard": newest / SHARD, "folder": newest / "zero", "checkpoint": newest}
    place = places.get(what, tmp_path / "c")
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link"):
        checkpoints.latest(config_hash="a")


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    newest = save(checkpoints, 10)
    (newest / "zero" / ".nfs0001").write_bytes(b"")
    assert checkpoints.latest(config_hash="a") is not None
    (newest / "zero" / "more.pt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ConfigError, match=r"more.pt is not listed in"):
        checkpoints.latest(config_hash="a")


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())


def flip(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(b"Z" + content[1:])


def test_what_was_just_committed_stays_beside_damaged_folders_of_later_steps(tmp_path: Path) -> None:
    notes: list[str] = []
    before = Checkpoints(tmp_path, keep=2)
    for step in (12, 16):
        flip(save(before, step))
    (tmp_path / "step_999999").mkdir()
    (tmp_path / "step_999999" / "notes.txt").write_text("not of a run")
    again = Checkpoints(tmp_path, keep=2, note=notes.append)
    assert again.latest(config_hash="a") is None
    save(again, 4)
    save(again, 8)
    found = Checkpoints(tmp_path, keep=2).latest(config_hash="a")
    assert found is not None
    assert found.state.step == 8
    assert steps_in(tmp_path) == [4, 8, 12, 16, 999999]
    for step in (12, 16):
        save(again, step)
    assert steps_in(tmp_path) == [12, 16, 999999], "trained again, they are replaced"
    assert len(notes) == 3


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_as_asked_are_kept_of_those_that_verify(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(checkpoints, step)
    flip(tmp_path / "step_000002")
    checkpoints = Checkpoints(tmp_path, keep=keep)
    save(checkpoints, 4)
    assert steps_in(tmp_path) == {1: [4], 2: [2, 3, 4][1:], 3: [1, 2, 3, 4]}[keep]
    flip(tmp_path / "step_000004")
    save(checkpoints, 5)
    assert steps_in(tmp_path) == {1: [5], 2: [3, 4, 5], 3: [1, 2, 3, 4, 5]}[keep], "damage in between is seen as well"


def test_a_checkpoint_of_another_configuration_does_not_count_as_one_to_fall_back_to(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    of_another_run = Checkpoints(tmp_path, keep=2)
    temporary = of_another_run.begin(2)
    write(temporary)
    of_another_run.commit(temporary, state(2, config_hash="b"))
    assert steps_in(tmp_path) == [1, 2]
    for step, left in ((3, [1, 2, 3]), (4, [3, 4])):
        save(checkpoints, step)
        assert steps_in(tmp_path) == left


def test_a_foreign_folder_is_not_taken_for_the_size_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    (tmp_path / "step_999999").mkdir()
    (tmp_path / "step_999999" / "huge").write_bytes(bytes(10**6))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    save(checkpoints, 2)
    (tmp_path / "step_000002" / "zero" / ".nfs1").write_bytes(bytes(10**6))
    with pytest.raises(OSError, match="are free"):
        save(checkpoints, 3)


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
