"""Runs with a label store learn what others learn, bit for bit; `stillhouse label` fills it without a student."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs_under_fault import assert_same_result
from tiny_runs import records, stillhouse, tiny_run

from trainer.labels.store_shard import open_shard

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
IN_ONE_PROCESS = {"runtime": "in_process", "student": {"ranks": 1}, "training": {"steps": 3, "save_every": 0}}
ONLY = ["--set", "store.mode=only"]


def said(*arguments: str, code: int = 0) -> str:
    result = stillhouse(*arguments)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def counts(run: Path, name: str) -> list[float]:
    return [record[f"labels/store_{name}"] for record in records(run, "step")]


def damage(store: Path) -> Path:
    """One bit of a label, in the shard of the rows to train on."""
    file = max(store.rglob("*.safetensors"), key=lambda path: len(open_shard(path).keys))
    content = bytearray(file.read_bytes())
    content[open_shard(file).columns[0][1].start] ^= 1
    file.write_bytes(content)
    return file


def test_neither_a_store_nor_a_run_from_it_alone_changes_what_is_learnt(golden: Path, tmp_path: Path) -> None:
    """Two ranks, and epochs of 40 rows in 8 steps of 8: the last three steps are a second epoch. One step at a time, or
    a row of the second may be asked for while it is scored for the first."""
    config = tiny_run(tmp_path, {"store": {"path": str(tmp_path / "labels")}, "training": {"depth": 0}})
    cold, alone = tmp_path / "cold", tmp_path / "alone"
    said("train", str(config), "--set", f"folder={cold}")
    assert_same_result(cold, golden)
    assert counts(cold, "misses") == [8] * 5 + [0] * 3
    assert counts(cold, "hits") == [0] * 5 + [8] * 3
    said("train", str(config), "--set", f"folder={alone}", *ONLY)
    assert_same_result(alone, golden)
    assert (counts(alone, "misses"), counts(alone, "hits")) == ([0] * 8, [8] * 8)
    assert all(record["scorer/score_s"] == 0 for record in records(alone, "step"))


def test_labels_are_made_without_a_student_and_then_trained_without_a_teacher(tmp_path: Path) -> None:
    store = tmp_path / "labels"
    config = tiny_run(tmp_path, IN_ONE_PROCESS | {"store": {"path": str(store)}})
    full = said("label", str(config), *ONLY, "--set", "store.max_bytes=1000", "--skip-self-test", code=4)
    assert re.search(r"30 of 30 sequences have no labels in .* of store.max_bytes 1 kB, .* raise store.max_bytes", full)
    assert "30 sequences: 0 had labels, 30 got them" in said("label", str(config), *ONLY)
    assert not (tmp_path / "run").exists()
    file = damage(store)
    missing = said("check", str(config), *ONLY, code=2)
    assert f"{file.name} is not used, labels in it do not match their checksum" in missing
    assert file.exists()
    again = said("label", str(config))
    assert again.count(f"{file.name} is not used, labels in it do not match their checksum") == 1
    found = re.search(r"30 sequences: (\d+) had labels, (\d+) got them \(", again)
    assert found is not None
    assert 6 <= int(found[1]) < 30 == int(found[1]) + int(found[2])  # those that were read before the damaged one count
    other = said("check", str(config), *ONLY, "--set", "labels.k=8", code=2)
    assert "has no labels for 24 of 30 sequences (24 of kind topk)" in other
    assert "differ from those of kind topk in encoding.k: 8, not 16" in other
    assert "30 sequences have labels in" in said("train", str(config), *ONLY)
    assert counts(tmp_path / "run", "misses") == [0] * 3
