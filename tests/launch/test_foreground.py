"""`status` and `list` of runs that were started in the foreground: told from what a run folder holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import submit
from launch.foreground import status_of
from launch.jobs import write_record
from launch.targets import JobRecord
from trainer.errors import ConfigError
from trainer.run_folder import RunFolder, write_json


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run under `runs/` that has trained 12 of 400 steps."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create(Path("runs/small"))
    folder.config.write_text("name: small\n")
    write_json(folder.manifest, {"started": time.time() - 60, "total_steps": 400})
    lines = [{"time": 1.0, "kind": "step", "step": step, "train/loss": 1.0} for step in (11, 12)]
    lines.append({"time": 1.0, "kind": "event", "step": 0, "name": "note", "text": "a later start"})
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def said(run: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return submit.status(run), capsys.readouterr().out


def test_a_run_that_works_is_running_with_its_step_and_process(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with folder.lock():
        assert said("small", capsys) == (
            0,
            f"running, step 12 of 400: pid {os.getpid()} (here), run folder runs/small\n",
        )
        assert said(str(folder.path), capsys)[1].startswith("running")
        submit.list_jobs()
    line = capsys.readouterr().out
    assert line.split()[:2] == ["running", "here"]
    assert "small" in line
    assert "12/400" in line


@pytest.mark.parametrize(
    ("code", "reason", "state"),
    [
        (0, "finished", "succeeded"),
        (75, "stopped after step 12; run the same command again to go on", "preempted"),
        (130, "interrupted", "stopped"),
        (3, "rows.jsonl:3: no answer", "failed"),
    ],
)
def test_a_run_that_has_ended_has_its_code_and_reason(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], code: int, reason: str, state: str
) -> None:
    write_json(folder.exit, {"code": code, "reason": reason, "time": time.time()})
    returned, text = said("small", capsys)
    assert returned == code
    assert text.splitlines()[0] == f"{state}, exit code {code}, step 12 of 400 (here), run folder runs/small"
    assert text.splitlines()[1:] == ([] if code == 0 else [reason])


def test_a_run_whose_process_was_killed_is_not_running_although_it_left_its_mark(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"import os; from trainer.run_folder import *; held = RunFolder(Path({str(folder.path)!r})).lock(); "
    subprocess.run([sys.executable, "-c", code + "held.__enter__(); os.kill(os.getpid(), 9)"], check=False)
    assert folder.lock_owner.exists()
    returned, text = said("small", capsys)
    assert returned == 4
    assert text.startswith("failed, step 12 of 400")
    assert "its process is gone" in text
    owner = json.loads(folder.lock_owner.read_text())
    write_json(folder.lock_owner, owner | {"pid": os.getppid(), "since": 1.0})  # the number was given to another one
    assert status_of(folder).state == "failed"


def test_a_run_of_another_machine_is_not_called_running_or_dead(folder: RunFolder) -> None:
    write_json(folder.lock_owner, {"pid": 1, "host": "elsewhere", "since": time.time()})
    found = status_of(folder)
    assert (found.state, found.step) == ("unknown", 12)
    assert "elsewhere" in found.message


@pytest.mark.parametrize("damage", ["", "[1, 2]", '{"pid": "x"}', '{"code": null}'])
def test_broken_records_end_no_listing(folder: RunFolder, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    for file in (folder.lock_owner, folder.exit, folder.manifest):
        file.write_text(damage)
    assert submit.list_jobs() == 0
    assert "small" in capsys.readouterr().out


def test_numbers_that_nobody_can_count_to_end_no_status(folder: RunFolder) -> None:
    number = "9" * 6000
    with folder.metrics.open("a") as file:
        file.write(f'{{"time": 1.0, "kind": "step", "step": {number}, "train/loss": 1.0}}\n')
    assert status_of(folder).step == 12


def test_logs_stop_and_fetch_say_that_there_is_no_job(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"made by `stillhouse train`.*stillhouse status small"):
        submit.logs("small", follow=False)


def test_a_submitted_job_is_asked_and_a_later_run_in_the_foreground_is_seen(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(folder.exit, {"code": 0, "reason": "finished", "time": time.time()})
    record = JobRecord(job="small-1", kind="local", name="small", folder=str(folder.path), handle="1 1.0")
    write_record(record)
    assert "small-1 (local)" in said("small", capsys)[1]
    with folder.lock():
        assert "(here)" in said("small", capsys)[1]
