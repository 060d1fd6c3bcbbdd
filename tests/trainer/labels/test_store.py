"""The label store: what is read is what was written, whatever happens to the disk and to other processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from configs.labels import Dense, Hidden, TopK
from trainer.errors import ConfigError
from trainer.labels.encoding import TeacherShape, load_encoding
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


def test_shards_that_changed_their_names_are_read_all_the_same(tmp_path: Path) -> None:
    for number in (1, 2):
        written(tmp_path, number)
    one, two = shards(tmp_path)
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    store = reader(tmp_path)
    found = store.read(SPACE, [key(1), key(2)])
    assert store.notes() == ()
    assert all(same(found[k], wanted) for k, wanted in some(1, 2).items())


@pytest.mark.parametrize("how", ["the shard", "the folder"])
def test_labels_of_another_teacher_are_not_read_where_its_shard_lies_in_the_place_of_this_ones(
    tmp_path: Path, how: str
) -> None:
    written(tmp_path, 1, space=OTHER)
    (theirs,) = shards(tmp_path)
    if how == "the folder":
        theirs.parent.rename(tmp_path / SPACE.id)
    else:
        written(tmp_path, 2)
        theirs.rename(tmp_path / SPACE.id / theirs.name)
    store = LabelStore(tmp_path, limits=LIMITS)
    assert store.read(SPACE, [key(1)]) == {}
    (note,) = store.notes()
    assert f"it holds labels of another kind, those of {OTHER.id}: its labels count as missing" in note
    assert (tmp_path / SPACE.id / theirs.name).exists()


def test_a_shard_with_the_index_of_another_one_is_an_error(tmp_path: Path) -> None:
    for number in (1, 5):  # as many rows
        written(tmp_path, number)
    one, two = shards(tmp_path)
    content, other = bytearray(one.read_bytes()), two.read_bytes()
    for (_, place), (_, there) in zip(open_shard(one).columns, open_shard(two).columns, strict=True):
        content[place.start : place.stop] = other[there.start : there.stop]
    one.write_bytes(content)
    with pytest.raises(DamagedShard, match="do not match their checksum"):
        open_shard(one).read(0)


def test_reading_all_labels_finds_those_that_are_not_whole(tmp_path: Path) -> None:
    written(tmp_path, 1)
    damage(shards(tmp_path)[0])
    written(tmp_path, 2)
    store = reader(tmp_path)
    assert store.missing(SPACE, [key(1), key(2), key(3)]) == [key(3)]
    assert store.unreadable(SPACE, [key(1), key(2), key(3), key(3)]) == [key(1), key(3)]


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


def test_a_disk_that_is_slower_than_the_teacher_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(max_bytes=10**9, free_bytes=0, shard_bytes=10, wait_s=60)
    monkeypatch.setattr("trainer.labels.store_writer.Writer._run", lambda self: None)
    store = LabelStore(tmp_path, limits=limits)
    for number in range(5):
        store.write(SPACE, some(number))
    (note,) = store.notes()
    assert "its disk is slower than labels are made" in note
    assert store.keeps


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=400k tmpfs "$1"
$2 -c "
from test_store import *
written(Path('$1'), 1)
$3
store = LabelStore(Path('$1'), limits=Limits(10**9, free_bytes=0, shard_bytes=40_000))
for number in range(2, 200):
    store.write(SPACE, {key(number): labels(number, rows=500)})
    time.sleep(0.002)
store.close()
print(*store.notes(), sep='\\n')
print('kept', store.keeps, 'left', [file.name for file in Path('$1').rglob('*' + UNFINISHED)])
print('whole', len(reader(Path('$1')).read(SPACE, map(key, range(400)))), 'of', len(shards(Path('$1'))))
"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("", "the disk has 0.00 GB left"),
        ("os.system('mount -o remount,ro $1')", "Read-only file system"),
    ],
    ids=["full", "read-only"],
)
def test_a_real_disk_that_is_full_or_read_only_costs_nothing_but_the_labels(
    tmp_path: Path, before: str, reason: str
) -> None:
    text = ON_A_SMALL_DISK.replace("$3", before)
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", text, "sh", str(tmp_path), sys.executable]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    if "mount" in ran.stderr and not ran.stdout:
        pytest.skip(f"no disk can be mounted here: {ran.stderr.splitlines()[0]}")
    note, kept, whole = ran.stdout.splitlines()
    assert f"{reason}: nothing more is written, and labels are made and used as before" in note
    assert kept == "kept False left []"
    found, num_shards = map(int, whole.removeprefix("whole ").split(" of "))
    assert found >= num_shards >= 1


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


def _write_all(path: Path) -> None:
    store = LabelStore(path, limits=Limits(max_bytes=10**9, free_bytes=0, shard_bytes=1000))
    for number in range(60):
        store.write(SPACE, some(number))
    store.close()


def test_runs_that_write_the_same_labels_at_once_leave_a_store_that_each_can_read(tmp_path: Path) -> None:
    processes = [multiprocessing.Process(target=_write_all, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = reader(tmp_path)
    found = store.read(SPACE, map(key, range(60)))
    assert store.notes() == ()
    assert all(same(found[k], wanted) for k, wanted in some(*range(60)).items())
    check_folder(tmp_path)


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
    before, now = LabelSpace.of({}, TopK(k=4), SHAPE), TopK.code_version
    monkeypatch.setattr(TopK, "code_version", now + 1)
    assert LabelSpace.of({}, TopK(k=4), SHAPE).difference(before) == [f"encoding.code_version: {now + 1}, not {now}"]


class More(TopK):
    """`topk` as it may be one day."""

    sharpness: float = 1.0


def test_a_parameter_that_an_encoding_gets_later_leaves_old_labels_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.labels.store_space.load_encoding", lambda labels: load_encoding(TopK(k=labels.k)))
    old = LabelSpace.of({"weights": "a"}, TopK(k=4), SHAPE)
    written(tmp_path, 1, space=old)
    new = LabelSpace.of({"weights": "a"}, More(k=4), SHAPE)
    store = LabelStore(tmp_path, limits=LIMITS)
    assert same(store.read(new, [key(1)])[key(1)], some(1)[key(1)])
    store.write(new, some(1, 2))
    store.close()
    assert len(shards(tmp_path)) == 2
    assert reader(tmp_path).read(new, [key(1), key(2)]).keys() == {key(1), key(2)}
    assert reader(tmp_path).read(old, [key(2)]) == {}, "an older version knows nothing of the new parameter"
    others = [
        LabelSpace.of({"weights": "a"}, More(k=4, sharpness=2.0), SHAPE),
        LabelSpace.of({"weights": "b"}, More(k=4), SHAPE),
        LabelSpace.of({"weights": "a"}, More(k=4, temperature=2.0), SHAPE),
    ]
    assert [reader(tmp_path).read(other, [key(1)]) for other in others] == [{}, {}, {}]


def test_another_default_makes_other_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Before(TopK):
        k: int = 4

    class After(TopK):
        k: int = 5

    monkeypatch.setattr("trainer.labels.store_space.load_encoding", lambda labels: load_encoding(TopK(k=4)))
    assert not LabelSpace.of({}, After(), SHAPE).includes(LabelSpace.of({}, Before(), SHAPE))


def test_a_description_that_lies_in_the_folder_of_another_space_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.labels.store_space.load_encoding", lambda labels: load_encoding(TopK(k=labels.k)))
    old = LabelSpace.of({"weights": "a"}, TopK(k=4), SHAPE)
    written(tmp_path, 1, space=OTHER)
    (tmp_path / OTHER.id / "space.json").write_text(old.text)
    assert reader(tmp_path).spaces() == []
    assert reader(tmp_path).read(LabelSpace.of({"weights": "a"}, More(k=4), SHAPE), [key(1)]) == {}


def test_the_key_is_that_of_tokens_and_asked_rows() -> None:
    ids, mask = np.arange(5, dtype=np.int32), np.array([0, 1, 1, 1, 0], dtype=bool)
    sequence = Sequence("0:1", ids, mask, "dataset")
    assert key_of(sequence) == key_of(Sequence("3:7", ids, mask, "teacher", task="other", weight=2.0))
    assert key_of(sequence) != key_of(Sequence("0:1", ids[::-1].copy(), mask, "dataset"))
    assert key_of(sequence) != key_of(Sequence("0:1", ids, np.array([0, 0, 1, 1, 0], dtype=bool), "dataset"))
