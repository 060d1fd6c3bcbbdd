"""Whole runs that tell how they ended: a real server hears of each ending once, with the run's own numbers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from runs_under_fault import events, finish, losses, start, when
from tiny_runs import tiny_run
from web_hooks import Hook, web_hook

from launch.report.metrics import read_metrics
from trainer.run_folder import RunFolder

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

EVERYTHING = ["end", "failure", "stall", "preemption"]
ENDLESS = {
    "student": {"ranks": 1},
    "training": {"steps": 4000, "save_every": 0, "save_every_minutes": 0},
    "optimizer": {"schedule": "constant"},
    "report": {"generate": 0, "viewer_sequences": 0},
}


def told(hook: Hook) -> dict[str, Any]:
    (notice,) = hook.posted
    return notice


def test_a_run_that_ends_tells_its_last_numbers_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    with web_hook() as hook:
        monkeypatch.setenv("MY_HOOK", hook.address)
        changes = {"runtime": "in_process", "student": {"ranks": 1}, "notify": {"webhook": "${MY_HOOK}"}}
        code, output = finish(start(tiny_run(tmp_path, changes)))
        assert code == 0, output
        records, notice = read_metrics(run), told(hook)
    assert (notice["kind"], notice["exit_code"], notice["run"]) == ("end", 0, "tiny")
    assert notice["step"] == notice["steps"] == records.steps[-1].step
    assert notice["loss"] == records.steps[-1].values["train/loss"]
    assert notice["evaluation"]["forward_kl"] == records.evaluations[-1].forward_kl
    assert notice["report"] == str(run.report)
    assert run.report.exists()
    written = "".join(file.read_text(errors="ignore") for file in run.path.rglob("*") if file.is_file())
    assert "secret-path" not in written + output


def test_what_stops_a_run_before_it_starts_is_told(tmp_path: Path) -> None:
    with web_hook() as hook:
        changes = {"notify": {"webhook": hook.address}, "teacher": {"model": {"path": str(tmp_path / "nowhere")}}}
        code, output = finish(start(tiny_run(tmp_path, changes)))
        assert code == 2, output
        notice = told(hook)
    assert (notice["kind"], notice["exit_code"], notice["step"]) == ("failure", 2, None)
    assert "teacher.model" in notice["reason"]


def test_a_run_that_is_preempted_tells_so_when_it_is_asked_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with web_hook() as hook:
        process = start(tiny_run(tmp_path, {**ENDLESS, "notify": {"webhook": hook.address, "on": EVERYTHING}}))
        when(run, lambda: 2 in losses(run), process)
        process.terminate()
        code, output = finish(process)
        assert code == 75, output
        notice = told(hook)
    assert (notice["kind"], notice["exit_code"]) == ("preemption", 75)
    assert notice["step"] == max(losses(run))


@pytest.mark.long
def test_a_run_that_gets_no_further_tells_so_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    faults = {"stall_timeout_s": 120, "step_timeout_s": 150, "ping_timeout_s": 600, "max_student_restarts": 0}
    with web_hook() as hook:
        changes = {**ENDLESS, "faults": faults, "notify": {"webhook": hook.address, "on": EVERYTHING}}
        process = start(tiny_run(tmp_path, changes))
        when(run, lambda: 2 in losses(run), process)
        rank = next(event["pid"] for event in events(run, "process") if event["role"] == "student-0")
        os.kill(rank, signal.SIGSTOP)
        code, output = finish(process, timeout_s=900)
        assert code == 4, output
        notice = told(hook)
    assert (notice["kind"], notice["exit_code"]) == ("stall", 4)
    assert "nothing was scored, trained or saved for 120 s" in notice["reason"]
