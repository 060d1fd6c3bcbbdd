"""The label store: what is read is what was written, whatever happens to the disk and to other processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from configs.labels import Dense, Hidden, TopK
from trainer.errors import ConfigError
from trainer.labels.encoding import TeacherShape
from trainer.labels.store import DAMAGED, LabelStore, check_folder
from trainer.labels.store_shard import Columns, DamagedShard, open_shard
from trainer.labels.store_space import LabelSpace, key_of
from trainer.labels.store_writer import MARKER, UNFINISHED, Limits
from trainer.types import Sequence

SPACE = LabelSpace({"teacher": {"weights": "a", "dtype": "float32"}, "encoding": {"kind": "topk", "k": 2}})
OTHER = LabelSpace({"teacher": {"weights": "b", "dtype": "float32"}, "encoding": {"kind": "topk", "k": 2}})
LIMITS = Limits(max_bytes=10**9, free_bytes=0)
AT_ONCE = Limits(max_bytes=10**9, free_bytes=0, shard_bytes=1)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def labels(number: int, rows: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(number)
    return {
        "tail": draw.standard_normal((rows, 1)).astype(np.float32),
        "ids": draw.integers(0, 2**16, (rows, 2), dtype=np.uint16),
        "logprobs": draw.standard_normal((rows, 2)).astype(np.float16),
    }


def some(*numbers: int) -> dict[bytes, dict[str, np.ndarray]]:
    return {key(n): labels(n, rows=1 + n % 4) for n in numbers}


def written(path: Path, *numbers: int, space: LabelSpace = SPACE, limits: Limits = LIMITS) -> LabelStore:
    store = LabelStore(path, limits=limits)
    store.write(space, some(*numbers))
    store.close()
    return store


def reader(path: Path) -> LabelStore:
    return LabelStore(path, limits=None)


def same(found: Columns, wanted: Columns) -> bool:
    return list(found) == list(wanted) and all(
        found[name].dtype == wanted[name].dtype
        and found[name].shape == wanted[name].shape
        and found[name].tobytes() == wanted[name].tobytes()
        for name in wanted
    )


def damage(file: Path) -> None:
    """One bit of the first label."""
    place = open_shard(file).columns[0][1].start
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*/*.safetensors"))


def test_labels_come_back_with_the_same_bytes(tmp_path: Path) -> None:
    assert written(tmp_path, *range(20)).notes() == ()
    found = reader(tmp_path).read(SPACE, map(key, range(20)))
    assert found.keys() == some(*range(20)).keys()
    assert all(same(found[k], wanted) for k, wanted in some(*range(20)).items())


def test_labels_are_there_before_they_are_on_the_disk(tmp_path: Path) -> None:
    store = LabelStore(tmp_path, limits=LIMITS)
    store.write(SPACE, some(1))
    assert same(store.read(SPACE, [key(1)])[key(1)], some(1)[key(1)])
    assert shards(tmp_path) == []
    store.close()
    assert len(shards(tmp_path)) == 1
    assert same(store.read(SPACE, [key(1)])[key(1)], some(1)[key(1)])


def test_labels_of_another_teacher_are_others(tmp_path: Path) -> None:
    written(tmp_path, 1)
    assert reader(tmp_path).read(OTHER, [key(1)]) == {}
    assert OTHER.difference(SPACE) == ["teacher.weights: b, not a"]
    assert [space.id for space in reader(tmp_path).spaces()] == [SPACE.id]


def test_what_is_missing_is_told_by_the_index(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    assert reader(tmp_path).missing(SPACE, [key(1), key(3), key(3)]) == [key(3)]


def test_labels_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    before = shards(tmp_path)
    written(tmp_path, 1, 2)
    assert shards(tmp_path) == before


def test_a_store_sees_what_others_write_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.labels.store.LOOK_AGAIN_S", 0.0)
    store = reader(tmp_path)
    assert store.read(SPACE, [key(1)]) == {}
    written(tmp_path, 1)
    assert store.read(SPACE, [key(1)]).keys() == {key(1)}


def test_a_shard_opens_with_safetensors_alone(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    arrays = load_file(shards(tmp_path)[0])
    assert arrays["keys"].tobytes() == key(1) + key(2)
    assert arrays["column.ids"].tolist() == [*labels(1, rows=2)["ids"].tolist(), *labels(2, rows=3)["ids"].tolist()]
    assert arrays["offsets"].tolist() == [[0, 2, 5]] * 3


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_an_error_and_never_another_label(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    file = shards(tmp_path)[0]
    content = file.read_bytes()
    wrong = []
    for place in range(0, len(content), 11):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            shard = open_shard(file)
            found = {k: shard.read(index) for index, k in enumerate(shard.keys)}
        except DamagedShard:
            continue
        if not all(same(found[k], wanted) for k, wanted in some(1, 2).items()):
            wrong.append(place)
    assert wrong == []


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    file = shards(tmp_path)[0]
    content = file.read_bytes()
    for length in range(0, len(content), 17):
        file.write_bytes(content[:length])
        with pytest.raises(DamagedShard):
            open_shard(file)


def test_a_damaged_shard_is_told_once_and_its_labels_are_made_again(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    file = shards(tmp_path)[0]
    damage(file)
    store = LabelStore(tmp_path, limits=LIMITS)
    assert store.read(SPACE, [key(1), key(2)]) == {}
    (note,) = store.notes()
    assert f"{SPACE.id}/{file.name} is not used, labels in it do not match their checksum" in note
    assert not file.exists()
    assert file.with_name(file.name + DAMAGED).exists()
    store.write(SPACE, some(1, 2))
    store.close()
    assert len(reader(tmp_path).read(SPACE, [key(1), key(2)])) == 2
    assert store.notes() == ()


def test_a_reader_leaves_a_damaged_shard_where_it_is(tmp_path: Path) -> None:
    written(tmp_path, 1)
    file = shards(tmp_path)[0]
    file.write_bytes(file.read_bytes()[:-3])
    store = reader(tmp_path)
    assert store.read(SPACE, [key(1)]) == {}
    assert len(store.notes()) == 1
    assert file.exists()


def test_labels_of_a_damaged_shard_are_found_in_another_one(tmp_path: Path) -> None:
    first = LabelStore(tmp_path, limits=LIMITS)
    second = LabelStore(tmp_path, limits=LIMITS)
    first.missing(SPACE, [key(1)])
    second.missing(SPACE, [key(1)])
    for store in (first, second):
        store.write(SPACE, some(1))
        store.close()
    one, two = shards(tmp_path)
    damage(one)
    store = reader(tmp_path)
    assert same(store.read(SPACE, [key(1)])[key(1)], some(1)[key(1)])
    damage(two)
    assert store.read(SPACE, [key(1)]) == {}
    assert len(store.notes()) == 2


def test_a_shard_that_goes_away_counts_as_missing(tmp_path: Path) -> None:
    written(tmp_path, 1)
    store = reader(tmp_path)
    assert store.missing(SPACE, [key(1)]) == []
    shards(tmp_path)[0].unlink()
    assert store.read(SPACE, [key(1)]) == {}
    assert len(store.notes()) == 1


def test_a_shard_of_another_format_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.labels.store_shard.FORMAT", "2")
    written(tmp_path, 1)
    monkeypatch.undo()
    store = LabelStore(tmp_path, limits=LIMITS)
    assert store.read(SPACE, [key(1)]) == {}
    assert "it is of format 2, not 1" in store.notes()[0]
    assert len(shards(tmp_path)) == 1


# --- space on the disk ------------------------------------------------------------------------------------------------


def test_nothing_is_written_beyond_the_limit(tmp_path: Path) -> None:
    written(tmp_path, 1)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    store = written(tmp_path, 2, limits=Limits(max_bytes=size + 10, free_bytes=0))
    assert len(shards(tmp_path)) == 1
    (note,) = store.notes()
    assert "store.max_bytes allows" in note
    assert store.read(SPACE, [key(1)]).keys() == {key(1)}


def test_room_on_the_disk_is_left_to_others(tmp_path: Path) -> None:
    store = written(tmp_path, 1, limits=Limits(max_bytes=2**50, free_bytes=2**60))
    assert shards(tmp_path) == []
    assert "GB left: nothing more is written" in store.notes()[0]


def test_a_disk_that_fails_is_told_once_and_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = LabelStore(tmp_path, limits=AT_ONCE)
    monkeypatch.setattr("os.fsync", full)
    for number in range(5):
        store.write(SPACE, some(number))
        time.sleep(0.01)
    store.close()
    (note,) = store.notes()
    assert "No space left on device" in note
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


# --- several processes ------------------------------------------------------------------------------------------------


def _write_for_ever(path: Path, first: int) -> None:
    store = LabelStore(path, limits=AT_ONCE)
    number = first
    while True:
        store.write(SPACE, some(number))
        number += 1
        time.sleep(0.001)


def test_writers_that_are_killed_leave_whole_shards(tmp_path: Path) -> None:
    processes = [multiprocessing.Process(target=_write_for_ever, args=(tmp_path, 1000 * n)) for n in range(2)]
    for process in processes:
        process.start()
    waited = time.monotonic() + 30
    while len(shards(tmp_path)) < 20 and time.monotonic() < waited:
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    store = reader(tmp_path)
    found = store.read(SPACE, map(key, range(2000)))
    assert store.notes() == ()
    assert len(found) >= 20
    assert all(same(one, some(int.from_bytes(k, "big"))[k]) for k, one in found.items())


def test_what_a_killed_process_left_unfinished_is_removed_after_a_day(tmp_path: Path) -> None:
    written(tmp_path, 1)
    old, new = (tmp_path / SPACE.id / f".{name}{UNFINISHED}" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    written(tmp_path, 2)
    assert not old.exists()
    assert new.exists()


# --- folders that are none --------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    check_folder(tmp_path)  # empty: it may become one
    check_folder(tmp_path / "not there yet")
    written(tmp_path / "store", 1)
    check_folder(tmp_path / "store")
    with pytest.raises(ConfigError, match="holds other files and is no label store"):
        check_folder(tmp_path)
    (tmp_path / "store" / MARKER).write_text('{"format": "7"}')
    with pytest.raises(ConfigError, match="of format 7, and this version has format 1"):
        check_folder(tmp_path / "store")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        check_folder(file)


# --- keys -------------------------------------------------------------------------------------------------------------

SHAPE = TeacherShape(vocabulary_size=100, hidden_size=8, dtype=torch.float32)


def test_whatever_changes_labels_changes_the_space() -> None:
    teacher = {"weights": "a", "dtype": "float32"}
    made = [
        LabelSpace.of(teacher, TopK(k=4), SHAPE),
        LabelSpace.of(teacher, TopK(k=5), SHAPE),
        LabelSpace.of(teacher, TopK(k=4, temperature=2.0), SHAPE),
        LabelSpace.of(teacher, Hidden(), SHAPE),
        LabelSpace.of(teacher, Dense(), SHAPE),
        LabelSpace.of(teacher | {"dtype": "bfloat16"}, TopK(k=4), SHAPE),
        LabelSpace.of(teacher, TopK(k=4), TeacherShape(2**17, 8, SHAPE.dtype)),  # ids of another dtype
    ]
    assert len({space.id for space in made}) == len(made)
    assert LabelSpace.of(dict(reversed(teacher.items())), TopK(k=4), SHAPE).id == made[0].id


def test_a_new_version_of_the_code_makes_other_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = LabelSpace.of({}, TopK(k=4), SHAPE)
    monkeypatch.setattr(TopK, "code_version", 99)
    assert LabelSpace.of({}, TopK(k=4), SHAPE).difference(before) == ["encoding.code_version: 99, not 1"]


def test_the_key_is_that_of_tokens_and_asked_rows() -> None:
    ids, mask = np.arange(5, dtype=np.int32), np.array([0, 1, 1, 1, 0], dtype=bool)
    sequence = Sequence("0:1", ids, mask, "dataset")
    assert key_of(sequence) == key_of(Sequence("3:7", ids, mask, "teacher", task="other", weight=2.0))
    assert key_of(sequence) != key_of(Sequence("0:1", ids[::-1].copy(), mask, "dataset"))
    assert key_of(sequence) != key_of(Sequence("0:1", ids, np.array([0, 0, 1, 1, 0], dtype=bool), "dataset"))
