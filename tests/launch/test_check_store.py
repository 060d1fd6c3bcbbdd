"""What `check` says of a label store before anything starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import chat_row, tiny_run, write_rows

from configs.load import load_run
from configs.schema import Run
from launch.check.run import check
from launch.check.store import examine_store
from trainer.labels.store import LabelStore
from trainer.labels.store_space import LabelSpace
from trainer.labels.store_writer import MARKER, Limits


def run_with(tmp_path: Path, **store: object) -> Run:
    config = tmp_path / "run.yaml"
    model = {"model": {"path": "x"}}
    given = {"name": "x", "student": model, "teacher": model, "prompts": {"path": "rows.jsonl"}, "store": store}
    config.write_text(json.dumps(given | {"training": {"steps": 1}}))
    return load_run(config, []).run


def told(run: Run) -> list[tuple[str, str]]:
    return [(finding.status, str(finding)) for finding in examine_store(run)]


def filled(path: Path) -> None:
    store = LabelStore(path, limits=Limits(10**9, free_bytes=0))
    store.write(LabelSpace({"teacher": "a"}), {bytes(16): {"x": np.zeros((1, 1), np.float32)}})
    store.close()


def test_a_run_without_a_store_is_told_nothing_of_it(tmp_path: Path) -> None:
    run = run_with(tmp_path, path="labels")
    assert told(run.model_copy(update={"store": None})) == []


def test_a_store_that_is_not_there_yet_is_fine_and_stays_so(tmp_path: Path) -> None:
    (one, *_) = told(run_with(tmp_path, path=str(tmp_path / "labels"), max_bytes=1000))
    assert one == ("ok", f"label store: {tmp_path / 'labels'}")
    assert not (tmp_path / "labels").exists()


def test_a_store_says_what_it_holds(tmp_path: Path) -> None:
    filled(tmp_path / "labels")
    ((status, text),) = told(run_with(tmp_path, path=str(tmp_path / "labels"), mode="read_only"))
    assert (status, "of 1 kind of labels" in text) == ("ok", True)


@pytest.mark.parametrize("mode", ["read_only", "only"])
def test_what_is_only_read_must_be_there(tmp_path: Path, mode: str) -> None:
    ((status, text),) = told(run_with(tmp_path, path=str(tmp_path / "labels"), mode=mode))
    assert (status, f"is not there, and mode: {mode} makes none" in text) == ("problem", True)


def test_a_file_a_foreign_folder_and_another_format_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    other = tmp_path / "other"
    filled(other)
    (other / MARKER).write_text('{"format": "9"}')
    expected = {file: "is a file; name a folder", tmp_path: "is no label store", other: "of format 9"}
    for path, words in expected.items():
        ((status, text),) = told(run_with(tmp_path, path=str(path)))
        assert (status, words in text) == ("problem", True), text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "labels")
    (tmp_path / "labels").chmod(0o500)
    ((status, text),) = told(run_with(tmp_path, path=str(tmp_path / "labels")))
    assert (status, "or write store.mode: read_only" in text) == ("problem", True)


def test_a_disk_that_a_store_may_fill_is_a_warning(tmp_path: Path) -> None:
    _, (status, text) = told(run_with(tmp_path, path=str(tmp_path / "labels"), max_bytes=2**50))
    assert (status, "labels that find no room are not kept" in text) == ("warning", True)


def test_rows_that_cannot_be_used_are_told_once_and_not_again_for_their_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels").mkdir()
    changes = {
        "runtime": "in_process",
        "student": {"ranks": 1},
        "store": {"path": str(tmp_path / "labels"), "mode": "only"},
    }
    config = tiny_run(tmp_path, changes)
    write_rows(tmp_path / "train.jsonl", [chat_row(0), {"prompt": [], "completion": []}])
    assert check(config, []) == 3
    said = capsys.readouterr().out
    assert said.count("train.jsonl:2") == 1
    assert "1 problem; nothing was started" in said
