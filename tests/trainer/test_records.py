"""Records read back: whatever a file holds, what is right comes back, the rest is told, and nothing is raised."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.report.metrics import MetricsLog, Timeline, read_metrics
from launch.report.page import render, write_report
from launch.report.timeline import read_timeline
from trainer.data.prompts import Quarantine
from trainer.errors import BadRow, ConfigError
from trainer.records import append_lines, read_json, read_lines, read_parts, read_record
from trainer.run_folder import RunFolder, write_json
from trainer.types import Evaluation, StepMetrics

NO_JSON = {
    "cut off": b'{"a": [1, 2',
    "binary": bytes(range(256)),
    "Latin-1": '{"a": "\u00e9"}'.encode("latin-1"),
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": 1e999}',
    "a huge integer": b'{"a": ' + b"9" * 5000 + b"}",
    "65 bits": b'{"a": 36893488147419103232}',
    "deep": b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}",
    "as deep as a stack": b"[" * 100_000,
    "half a surrogate": b'{"a": "\\ud800"}',
    "empty": b"",
}
NO_OBJECT = [b"[]", b"null", b"3", b'"text"']
OF_ANOTHER_SHAPE = [*NO_OBJECT, b'{"a": "1"}', b'{"a": null}', b'{"a": [1]}', b'{"a": true}', b"{}"]


@dataclass(frozen=True)
class One:
    a: int


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_one_message_with_the_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.json.*this is no JSON"):
        read_json(file)
    told: list[str] = []
    assert read_parts(file, dict[str, Any], tell=told.append) == {}
    assert len(told) == 1


@pytest.mark.parametrize("content", OF_ANOTHER_SHAPE)
def test_a_record_of_another_shape_is_one_message_with_the_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.json"):
        read_record(file, One)
    file.write_bytes(b'{"a": 3, "of another version": []}')
    assert read_record(file, One) == One(3)


@pytest.mark.parametrize("content", [*NO_JSON.values(), *NO_OBJECT])
def test_a_bad_line_costs_itself_alone_and_is_told_with_its_number(content: bytes, tmp_path: Path) -> None:
    file, told = tmp_path / "x.jsonl", []
    bad = content.replace(b"\n", b" ")
    file.write_bytes(b'{"a": 1}\n' + bad + b'\n{"a": 2}\n' + bad + b"\n")
    assert list(read_lines(file, tell=told.append)) == [{"a": 1}, {"a": 2}]
    assert len(told) == 1
    assert told[0].startswith(f"{file}:2: ")
    assert told[0].endswith("this line is left out, like 1 more")


def test_a_pipe_a_device_and_a_folder_are_no_records_and_nobody_waits_for_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="a record is a file"):
            read_json(place)
        told: list[str] = []
        assert list(read_lines(place, tell=told.append)) == []
        assert len(told) == 1


def test_lines_are_appended_after_the_last_whole_one_also_in_a_long_file(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for content, kept in [(b"", b""), (b"{}", b""), (b"{}\n", b"{}\n"), (b"{}\n" + b"x" * 200_000, b"{}\n")]:
        file.write_bytes(content)
        append_lines(file).close()
        assert file.read_bytes() == kept


def test_a_run_goes_on_after_a_bad_line_of_its_log_and_says_which(tmp_path: Path) -> None:
    folder, told = RunFolder.create(tmp_path), []
    log = MetricsLog(folder)
    log.evaluation(Evaluation(0, 10, 6.0, 0.5, 9.0, 8.0))
    for number in (1, 2, 3):
        log.step(StepMetrics(number, {"train/loss": 1.0}))
    log.close()
    lines = folder.metrics.read_text().splitlines()
    wrong = ["[]", '{"kind": "step"}', '{"kind": "step", "step": "2"}', '{"kind": "x", "step": 1, "time": 1}']
    wrong += ['{"kind": "evaluation", "step": 1}', '{"kind": "event", "step": 1}', lines[1].replace("1.0", '"1"')]
    folder.metrics.write_text("\n".join([lines[0], *wrong, *lines[1:]]) + "\n")
    assert [s.step for s in read_metrics(folder).steps] == [1, 2, 3]

    log = MetricsLog(folder, tell=told.append)
    log.resume(2)
    log.step(StepMetrics(3, {"train/loss": 0.5}))
    log.close()
    assert len(told) == 1
    assert told[0].startswith(f"{folder.metrics}:2: ")
    assert "like 6 more" in told[0]
    assert [(s.step, s.values["train/loss"]) for s in read_metrics(folder).steps] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert read_metrics(folder).evaluations[0].forward_kl == 6.0
    assert len(folder.metrics.read_text().splitlines()) == 4


def test_a_bad_line_in_the_list_of_rejected_rows_does_not_end_a_run(tmp_path: Path) -> None:
    file = tmp_path / "rejected.jsonl"
    Quarantine(file).list(BadRow("rows.jsonl:1", "why"))
    with file.open("a") as lines:
        lines.write('no json\n[]\n{"origin": 3}\n{"orig')
    quarantine = Quarantine(file)
    assert len(quarantine.notes) == 1
    assert f"{file}:2: " in quarantine.notes[0]
    quarantine.list(BadRow("rows.jsonl:1", "why"))
    quarantine.list(BadRow("rows.jsonl:2", "why"))
    assert [json.loads(line)["origin"] for line in file.read_text().splitlines() if "rows.jsonl" in line] == [
        "rows.jsonl:1",
        "rows.jsonl:2",
    ]


def test_the_report_leaves_damaged_records_out_and_names_them(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    log, timeline = MetricsLog(folder), Timeline(folder)
    for number in (1, 2):
        log.step(StepMetrics(number, {"train/loss": 1.0}))
        timeline.span("student", "train", number, number + 1)
    sample = {"id": "whole-sample", "tokens": ["a", "b"], "rows": [0]}
    sample |= {name: [0.5] for name in ("student_logprob", "teacher_logprob", "kl")}
    write_json(folder.samples, {"before": [sample, sample | {"rows": [0, 1]}, sample | {"kl": "x"}, 3]})
    write_json(folder.generations, {"prompts": ["asked"], "before": ["answered"], "after": 5})
    write_json(folder.manifest, {"warnings": 5, "started": "today", "versions": [], "note": "kept"})
    folder.exit.write_text("[]")
    folder.config.write_text("name: [unclosed")
    for file in (folder.metrics, folder.timeline):
        with file.open("a") as lines:
            lines.write("no json\n")
    page = render(folder)
    for name in (
        "metrics.jsonl:3",
        "timeline.jsonl:3",
        "samples.json",
        "generations.json",
        "manifest.json",
        "exit.json",
    ):
        assert f"{folder.path}/{name}" in page
    assert f"{folder.config}:1: this is not YAML" in page
    for kept in ("whole-sample", "answered", "kept", "step 2"):
        assert kept in page
    assert [s.start_s for s in read_timeline(folder)] == [1, 2]


@pytest.mark.parametrize("name", ["manifest.json", "exit.json", "samples.json", "generations.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [*NO_JSON.values(), *OF_ANOTHER_SHAPE])
def test_no_file_of_a_run_folder_keeps_the_report_from_being_written(name: str, content: bytes, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.config.write_text("name: x\n")
    (tmp_path / name).write_bytes(content + b"\n")
    assert write_report(folder).is_file()
