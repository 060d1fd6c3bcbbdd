"""What tells one file from another: every change of a small one, and of a large one those that a sample sees."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from configs.prompts import Dataset
from trainer.data.content import BLOCK_BYTES, file_content, files_below, folder_content
from trainer.data.row_files import open_raw_rows

SAMPLE = {"whole_bytes": 1000, "places": 8}


def with_byte(path: Path, place: int) -> str:
    """The content of a file with one byte changed, its time of modification as it was."""
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    old = path.read_bytes()
    path.write_bytes(old[:place] + bytes([old[place] ^ 1]) + old[place + 1 :])
    os.utime(path, ns=times)
    found = file_content(path, **SAMPLE)
    path.write_bytes(old)
    return found


def test_every_byte_of_a_small_file_counts_and_its_place_and_times_do_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(os.urandom(999))
    before = file_content(path, **SAMPLE)
    assert all(with_byte(path, place) != before for place in (0, 500, 998))
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copyfile(path, tmp_path / "moved" / "other.jsonl"))
    os.utime(moved, (1, 1))
    assert file_content(moved, **SAMPLE) == before
    assert before.startswith("999 bytes, ")


def test_a_large_file_is_sampled_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    size = 40 * BLOCK_BYTES + 17
    path.write_bytes(os.urandom(size))
    before = file_content(path, **SAMPLE)
    seen = [place for place in range(0, size, BLOCK_BYTES // 2) if with_byte(path, place) != before]
    assert {0} <= set(seen)
    assert len(seen) >= 15
    assert with_byte(path, size - 1) != before
    assert len(seen) < size // (BLOCK_BYTES // 2), "it is a sample: some changes that keep the size are missed"
    path.write_bytes(path.read_bytes() + b"x")
    assert file_content(path, **SAMPLE) != before


def test_rows_that_change_places_in_a_large_file_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    rows = [json.dumps({"text": f"row {i:05d} " + "drop " * 20}) + "\n" for i in range(10_000)]
    path.write_text("".join(rows))
    before = file_content(path, **SAMPLE)
    path.write_text("".join(rows[1:] + rows[:1]))
    assert file_content(path, **SAMPLE) != before


def test_another_value_of_any_tensor_and_another_name_are_seen_in_large_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {f"layer.{i}.norm": torch.ones(9000) for i in range(40)}
    save_file(tensors, path)
    before = file_content(path, whole_bytes=1000, places=2)
    for name in tensors:
        save_file({**tensors, name: tensors[name] * 1.5}, path)
        assert file_content(path, whole_bytes=1000, places=2) != before, name
    save_file({name.replace("layer.7.", "layer.x."): value for name, value in tensors.items()}, path)
    assert file_content(path, whole_bytes=1000, places=2) != before
    save_file(tensors, path)
    assert file_content(path, whole_bytes=1000, places=2) == before


@pytest.mark.parametrize("head", [b"", b"\xff" * 8, (50_000).to_bytes(8, "little") + b"[1" * 25_000])
def test_a_file_that_only_calls_itself_safetensors_has_a_content_too(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + os.urandom(100_000))
    assert file_content(path, **SAMPLE) == file_content(path, **SAMPLE)


def test_a_folder_is_told_by_the_names_and_contents_of_what_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("a.parquet", "sub/b.parquet", ".hidden", ".cache/c.parquet"):
        (tmp_path / name).write_text(name)
    assert list(folder_content(files_below(tmp_path), **SAMPLE)) == ["a.parquet", "sub/b.parquet"]


@pytest.mark.parametrize("kind", ["parquet", "json", "json.gz", "folder"])
def test_a_table_that_was_rewritten_with_the_time_of_the_old_one_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import gzip

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    path = folder / ("rows.parquet" if kind == "folder" else f"rows.{kind}")
    for word in ("old", "new"):
        rows = [{"text": word}] * 3
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            text = json.dumps(rows).encode()
            path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
        os.utime(path, (10**9, 10**9))
        found = open_raw_rows(Dataset(path=str(folder if kind == "folder" else path)))
        assert [found.raw(i)["text"] for i in range(3)] == [word] * 3
