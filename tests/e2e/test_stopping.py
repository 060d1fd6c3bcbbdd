"""Every way in which a run is ended: what it saves, what it returns, and that nothing of it is left on the machine.

SIGTERM, and what a run learns after it was stopped and started again, are in `test_runs.py`; the death of the run's own
process in `test_vllm_runs.py`; SIGUSR1, as Slurm sends it, in `hosts/test_slurm.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from leftovers import leftovers
from runs_under_fault import events, finish, losses, notes, start, when
from tiny_runs import SHARDED, tiny_run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

BRIEF = {
    "student": {"ranks": 1},
    "training": {"steps": 400, "save_every": 0, "save_every_minutes": 0},
    "optimizer": {"schedule": "constant"},
    "report": {"generate": 0, "viewer_sequences": 0},
}


def checkpoints(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def control_c(process: subprocess.Popen[str]) -> None:
    """As a terminal sends it: to every process of the foreground group."""
    os.killpg(process.pid, signal.SIGINT)


def closed(process: subprocess.Popen[str]) -> None:
    """As a terminal says that it is closed: to the same ones."""
    os.killpg(process.pid, signal.SIGHUP)


@pytest.mark.parametrize("ask", [control_c, closed])
def test_asked_once_it_saves_exits_75_and_leaves_nothing(
    tmp_path: Path, ask: Callable[[subprocess.Popen[str]], None]
) -> None:
    run = tmp_path / "run"
    with leftovers() as left:
        process = start(tiny_run(tmp_path, {**BRIEF, **SHARDED}))
        when(run, lambda: 2 in losses(run), process)
        assert len(left.processes()) > 4, "the search finds the run while it is there"
        ask(process)
        code, output = finish(process)
        assert left.after() == []
    assert code == 75, output
    last = max(losses(run))
    assert checkpoints(run) == [f"step_{last:06d}"]
    assert "Traceback" not in output


def test_asked_while_rows_and_models_are_checked_it_ends_with_75(tmp_path: Path) -> None:
    process = start(tiny_run(tmp_path, {**BRIEF, "runtime": "in_process"}))
    while not _hears(process, signal.SIGTERM):
        assert process.poll() is None
        time.sleep(0.02)
    assert not (tmp_path / "run").exists(), "nothing has begun"
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert "stopped by SIGTERM while no step was trained; run the same command again to go on" in output


def _hears(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a handler of the process is there for the signal."""
    caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_asked_twice_it_ends_at_once_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # a step that lasts longer than anybody waits, so that the second signal finds the first unanswered
    slow = {"training": {"sequences_per_step": 40, "steps": 400, "save_every": 0}}
    with leftovers() as left:
        process = start(tiny_run(tmp_path, {**BRIEF, **slow}))
        when(run, lambda: 1 in losses(run), process)
        rank = next(event["pid"] for event in events(run, "process") if event["role"] == "student-0")
        os.kill(rank, signal.SIGSTOP)
        control_c(process)
        when(run, lambda: any("SIGINT: stopping after this step" in note for note in notes(run)), process)
        time.sleep(1.5)
        assert process.poll() is None, "it waits for the step"
        control_c(process)
        asked = time.monotonic()
        code, output = finish(process)
        took = time.monotonic() - asked
        assert left.after() == []
    assert code == 130, output
    assert took < 200, f"{took:.0f} s"
    assert "Traceback" not in output


def test_an_error_in_the_middle_ends_with_its_text_and_leaves_nothing(tmp_path: Path) -> None:
    run, trigger = tmp_path / "run", tmp_path / "now"
    labels = {
        "labels": {"kind": "fakes.failing_labels", "trigger": str(trigger)},
        "faults": {"max_student_restarts": 0},
    }
    with leftovers() as left:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"), prepend=os.pathsep)
            process = start(tiny_run(tmp_path, {**BRIEF, **labels}))
        when(run, lambda: 2 in losses(run), process)
        trigger.touch()
        code, output = finish(process)
        assert left.after() == []
    assert code == 4, output
    assert "a bug in the middle of the run" in output
    assert "Traceback" not in output


def test_a_run_that_gets_no_further_saves_says_where_it_waited_and_ends_with_4(tmp_path: Path) -> None:
    run = tmp_path / "run"
    patient = {"ping_interval_s": 600, "ping_timeout_s": 600, "score_timeout_s": 600, "stall_timeout_s": 20}
    with leftovers() as left:
        process = start(tiny_run(tmp_path, {**BRIEF, "faults": patient}))
        when(run, lambda: 2 in losses(run), process)
        os.kill(next(event["pid"] for event in events(run, "process") if event["role"] == "scorer-0"), signal.SIGSTOP)
        code, output = finish(process)
        assert left.after() == []
    assert code == 4, output
    last = max(losses(run))
    assert f"stall.txt. stopped after step {last}" in output
    assert "Traceback" not in output
    assert checkpoints(run) == [f"step_{last:06d}"]
    assert f"unit {last + 1}/" in (run / "stall.txt").read_text()


def test_a_record_of_bad_rows_that_cannot_be_written_ends_the_run_and_what_was_trained_is_saved(tmp_path: Path) -> None:
    changes = {
        "runtime": "in_process",
        "student": {"ranks": 1},
        "data": {"on_bad_row": "skip", "shuffle": False},
        "training": {"save_every": 0},
    }
    config, run = tiny_run(tmp_path, changes), tmp_path / "run"
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    rows[20] = '{"prompt": 3}'
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    run.mkdir()
    (run / "rejected.jsonl").symlink_to("/nowhere/rejected.jsonl")
    code, output = finish(start(config), timeout_s=300)
    assert code == 4, output
    assert f"the run folder {run} cannot be used" in output
    assert checkpoints(run) == ["step_000002"]
