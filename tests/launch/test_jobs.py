"""What is remembered of submitted jobs: a record that is damaged costs itself alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch.cli import app, run_app
from launch.jobs import all_records, ending_file, find_record, run_status, visible_folder, write_record
from launch.submit import list_jobs
from launch.targets import JobRecord, RunStatus, load_target
from launch.targets.common import follow_file
from trainer.errors import ConfigError

DAMAGED = {
    "cut": '{"job": "a-1", "ki',
    "a list": "[]",
    "a field missing": '{"job": "a-1", "kind": "local"}',
    "another type": '{"job": "a-1", "kind": "local", "name": "bad", "folder": 3}',
    "a place elsewhere": '{"job": "a-1", "kind": "local", "name": "../../bad", "folder": "/x"}',
    "no time": '{"job": "a-1", "kind": "local", "name": "bad", "folder": "/x", "submitted": 1e300}',
}


def good(folder: Path, **changes: object) -> JobRecord:
    fields = {"job": "good-1", "kind": "local", "name": "good", "folder": str(folder), "handle": "4194999 1.5"}
    return JobRecord(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_told_and_the_others_are_listed(
    text: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(good(here / "out"))
    (here / "runs" / "bad").mkdir()
    (here / "runs" / "bad" / "submission.json").write_text(text)
    told: list[str] = []
    assert [record.name for record in all_records(tell=told.append)] == ["good"]
    assert len(told) == 1
    assert told[0].startswith("runs/bad/submission.json")
    assert list_jobs() == 0
    shown = capsys.readouterr()
    assert "good-1" in shown.out
    assert shown.err.startswith("warning: runs/bad/submission.json")
    with pytest.raises(ConfigError, match=r"bad/submission\.json.*submit the run again"):
        find_record("bad")
    assert find_record("good").job == "good-1"


@pytest.mark.parametrize(
    "changes", [{"handle": "x"}, {"handle": ""}, {"handle": "9" * 40 + " 1"}, {"options": {"a": 1}}]
)
def test_a_record_that_names_no_process_or_foreign_options_is_one_message(here: Path, changes: dict) -> None:
    record = good(here, **changes)
    write_record(record)
    target = load_target("local")
    if "options" in changes:
        assert target.status(record).state == "failed"
    else:
        with pytest.raises(ConfigError, match="the record of good-1 names no process"):
            target.status(record)
    assert list_jobs() == 0


@pytest.mark.parametrize("text", ["[]", '{"code": "0", "time": 9e9}', '{"code": 0, "time": NaN}', "{", '{"time": 9e9}'])
def test_a_note_of_another_shape_is_no_exit_code(text: str, tmp_path: Path) -> None:
    file = ending_file(tmp_path, "good-1")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert run_status(tmp_path, "good-1") == RunStatus()


def test_a_command_that_was_submitted_notes_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ending_file(tmp_path / "run", "good-1")
    monkeypatch.setenv("HF_TOKEN", "hf_plantedsecret")
    (tmp_path / "run.yaml").write_text("name: hf_plantedsecret/\n")
    monkeypatch.setattr("sys.argv", ["stillhouse", "train", str(tmp_path / "run.yaml"), "--ending", str(file)])
    with pytest.raises(SystemExit):
        run_app(app)
    written = run_status(tmp_path / "run", "good-1")
    assert written.exit_code == 2
    assert written.reason
    assert "plantedsecret" not in file.read_text()
    assert run_status(tmp_path / "run", "good-2") == RunStatus()
    assert visible_folder(good(tmp_path / "run", submitted=time.time() - 10)) == tmp_path / "run"
    assert visible_folder(good(tmp_path / "run", job="good-2", submitted=time.time() - 10)) is None


def test_steps_are_those_of_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"total_steps": 9}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"time": 1.0, "kind": "step", "step": 4}\n{"time": 2.0, "kind": "event"}\n'
    )
    assert run_status(tmp_path, "good-1") == RunStatus(4, 9)


def test_an_output_that_grows_is_followed_to_its_end_without_breaking_characters(tmp_path: Path) -> None:
    file, asked = tmp_path / "job.log", []
    text = "a" + "ü" * 2**16  # longer than what is read at once, with a character on the seam

    def over() -> bool:
        asked.append(len(asked))
        with file.open("ab") as output:  # it is written while it is asked for; half a character the first time
            output.write(text.encode()[:-1] if len(asked) == 1 else text.encode()[-1:] + b"end")
        return len(asked) == 2

    assert "".join(follow_file(file, over=over, poll_s=0)) == text + "end"
