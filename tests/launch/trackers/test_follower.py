"""A tracker of a run: it gets every point once, in its own process, and can neither end the run nor slow it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import trackers_of
from trackers_of import evaluation, step, wait_for

from configs.load import dump_run
from configs.schema import Run
from launch.report.metrics import MetricsLog
from launch.sync import sync
from launch.trackers import follower, trackers
from launch.trackers.trackers import Trackers
from trainer.errors import ConfigError, InfrastructureError
from trainer.run_folder import RunFolder, write_json


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def run_with(tmp_path: Path) -> Callable[..., tuple[Run, RunFolder]]:
    def make(**parameters: Any) -> tuple[Run, RunFolder]:
        return trackers_of.run_with(tmp_path, {"kind": "fakes.diary", "file": str(tmp_path / "diary"), **parameters})

    return make


def diary(tmp_path: Path) -> list[list[Any]]:
    file = tmp_path / "diary"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def steps(tmp_path: Path) -> list[int]:
    return [entry[2] for entry in diary(tmp_path) if entry[:2] == ["log", "step"]]


def test_a_tracker_gets_every_point_under_the_names_of_the_log_and_how_the_run_ended(
    run_with: Any, tmp_path: Path, told: list[str]
) -> None:
    run, folder = run_with()
    with Trackers(run, folder, goes_on=False, tell=told.append) as followers:
        log = MetricsLog(folder, rewound=followers.rewound)
        log.evaluation(evaluation(0))
        log.step(step(1, loss=2.5))
        log.step(step(2, loss=float("inf")))
        log.event("teacher_lost", replica="scorer-0")
        log.close()
    began, rewind, before, first, second, close = diary(tmp_path)
    assert (began[0], began[2:], rewind) == ("begin", ["tiny", 9], ["rewind", -1])
    assert before[1:3] == ["evaluation", 0]
    assert before[3]["evaluation/forward_kl"] == 0.5
    assert (first, second) == (
        ["log", "step", 1, {"train/loss": 2.5}],
        ["log", "step", 2, {"train/loss": float("inf")}],
    )
    assert close == ["close", [0, "finished"]]
    assert told == [f"fakes.diary: less {tmp_path / 'diary'}"]


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_run_that_goes_on_keeps_its_id_and_no_step_is_there_twice(
    rewinds: bool, run_with: Any, tmp_path: Path, told: list[str]
) -> None:
    run, folder = run_with(rewinds=rewinds)
    with Trackers(run, folder, goes_on=False, tell=told.append) as followers:
        log = MetricsLog(folder, rewound=followers.rewound)
        for number in range(1, 6):
            log.step(step(number))
        log.close()
    with Trackers(run, folder, goes_on=True, tell=told.append) as followers:
        log = MetricsLog(folder, rewound=followers.rewound)
        log.resume(3)
        for number in range(4, 8):
            log.step(step(number, loss=0.5))
        log.close()
    assert len({entry[1] for entry in diary(tmp_path) if entry[0] == "begin"}) == 1
    if rewinds:
        assert steps(tmp_path) == [1, 2, 3, 4, 5, 4, 5, 6, 7], "the second 4 and 5 come after a rewind to 3"
        assert [entry[1] for entry in diary(tmp_path) if entry[0] == "rewind"] == [0, 3]
    else:
        assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_that_starts_afresh_is_another_one_at_the_tracker(run_with: Any, tmp_path: Path, told: list[str]) -> None:
    run, folder = run_with(rewinds=False)
    for _ in range(2):
        with Trackers(run, folder, goes_on=False, tell=told.append) as followers:
            log = MetricsLog(folder, rewound=followers.rewound)
            log.step(step(1))
            log.close()
    assert len({entry[1] for entry in diary(tmp_path) if entry[0] == "begin"}) == 2
    assert steps(tmp_path) == [1, 1]


def test_a_tracker_that_was_added_later_gets_the_whole_run(run_with: Any, tmp_path: Path, told: list[str]) -> None:
    run, folder = run_with()
    log = MetricsLog(folder)
    for number in (1, 2, 3):
        log.step(step(number))
    log.close()
    with Trackers(run, folder, goes_on=True, tell=told.append) as followers:
        log = MetricsLog(folder, rewound=followers.rewound)
        log.resume(3)
        log.step(step(4))
        log.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_tracker_that_fails_is_told_once_and_gets_what_it_missed_when_it_answers_again(
    run_with: Any, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIARY_PASSWORD", "open-sesame-123")
    trouble = tmp_path / "trouble"
    trouble.write_text("raise")
    run, folder = run_with(trouble=str(trouble))
    with Trackers(run, folder, goes_on=False, tell=told.append) as followers:
        log = MetricsLog(folder, rewound=followers.rewound)
        log.step(step(1))
        wait_for(lambda: told)
        assert told[0] == (
            "fakes.diary: the diary is locked with password ***; the run goes on, and what is missing there is sent "
            "when that succeeds"
        )
        trouble.unlink()
        log.step(step(2))
        wait_for(lambda: len(told) > 2)
        log.step(step(3))
        log.close()
    assert told[2:] == ["fakes.diary: it answers again, and has everything until step 2"]
    assert steps(tmp_path) == [1, 2, 3]
    assert "***" in (folder.logs / "tracker-fakes.diary.log").read_text()


def test_a_tracker_that_fails_to_the_end_is_named_with_what_is_missing(
    run_with: Any, tmp_path: Path, told: list[str]
) -> None:
    trouble = tmp_path / "trouble"
    run, folder = run_with(trouble=str(trouble))
    with Trackers(run, folder, goes_on=False, tell=told.append) as followers:
        log = MetricsLog(folder, rewound=followers.rewound)
        log.step(step(1))
        wait_for(lambda: steps(tmp_path) == [1])
        trouble.write_text("raise")
        log.step(step(2))
        log.close()
    assert "what came after step 1 is not there, and is in metrics.jsonl" in told[-1]


def test_a_tracker_that_hangs_costs_a_bounded_time_at_the_end_and_leaves_no_process(
    run_with: Any, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 5.0)
    (tmp_path / "trouble").write_text("hang")
    run, folder = run_with(trouble=str(tmp_path / "trouble"))
    before = set(psutil.Process().children())
    with Trackers(run, folder, goes_on=False, tell=told.append) as followers:
        (child,) = set(psutil.Process().children()) - before
        log = MetricsLog(folder, rewound=followers.rewound)
        began = time.monotonic()
        for number in range(1, 2001):
            log.step(step(number))
        assert time.monotonic() - began < 3, "the run waits for nobody"
        log.close()
        began = time.monotonic()
    assert time.monotonic() - began < 7
    assert not child.is_running()
    assert told == [
        "fakes.diary: no answer within 2 s of the end of the run; this run may not be there, and is in metrics.jsonl"
    ]


def test_a_tracker_that_hangs_in_the_middle_is_told(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the process, without the process."""
    monkeypatch.setattr(follower, "POLL_S", 0.05)
    monkeypatch.setattr(follower, "HANGS_AFTER_S", 0.2)

    class Busy:
        calls_since = time.monotonic()

        def order(self, what: object) -> None:
            assert what is None

    read, write = os.pipe()
    with os.fdopen(read) as orders, os.fdopen(write, "w") as run:
        thread = threading.Thread(
            target=follower._pass_on, args=(orders, Busy()), kwargs={"name": "x", "tell": told.append}
        )
        thread.start()
        wait_for(lambda: told)
        time.sleep(0.3)
        run.close()
        thread.join()
    assert told == ["x: no answer for 0 s; the run goes on, and what is missing there is sent later"]


def test_a_tracker_whose_process_dies_is_told(run_with: Any, tmp_path: Path, told: list[str]) -> None:
    (tmp_path / "trouble").write_text("die")
    run, folder = run_with(trouble=str(tmp_path / "trouble"))
    with Trackers(run, folder, goes_on=False, tell=told.append) as followers:
        log = MetricsLog(folder, rewound=followers.rewound)
        log.step(step(1))
        wait_for(lambda: told)
        log.step(step(2))
        log.close()
    (text,) = told
    assert text.startswith("fakes.diary: its process ended with code 7; see ")
    assert text.endswith("tracker-fakes.diary.log. The run goes on without it")


def test_a_run_that_fails_says_so_and_one_that_is_killed_is_closed_without_a_word(
    run_with: Any, tmp_path: Path, told: list[str]
) -> None:
    run, folder = run_with()
    followers = Trackers(run, folder, goes_on=False, tell=told.append).__enter__()
    MetricsLog(folder, rewound=followers.rewound).step(step(1))
    followers.__exit__(None, InfrastructureError("a disk is full\nwith details"), None)
    assert diary(tmp_path)[-1] == ["close", [InfrastructureError.exit_code, "a disk is full"]]
    pid = os.fork()
    if pid == 0:
        followers = Trackers(run, folder, goes_on=True, tell=told.append).__enter__()
        MetricsLog(folder, rewound=followers.rewound).step(step(2))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for(lambda: diary(tmp_path)[-1] == ["close", None])
    assert steps(tmp_path) == [1, 2]


def test_sync_sends_a_run_that_is_over_and_only_what_is_missing(
    run_with: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = run_with(rewinds=False)
    log = MetricsLog(folder)
    for number in (1, 2, 3):
        log.step(step(number))
    log.close()
    with pytest.raises(ConfigError, match=r"holds no run with numbers: metrics.jsonl and config.yaml are needed"):
        sync(folder.path, [])
    folder.config.write_text(dump_run(run))
    write_json(folder.exit, {"code": 5, "reason": "diverged", "time": 1.0})
    for _ in range(2):
        sync(folder.path, [])
    assert steps(tmp_path) == [1, 2, 3]
    assert [entry for entry in diary(tmp_path) if entry[0] == "close"] == [["close", [5, "diverged"]]] * 2
    assert "sent: 3 steps, 0 evaluations" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="names no tracker; name one, for example: stillhouse sync"):
        sync(folder.path, ["trackers=[]"])
    (tmp_path / "trouble").write_text("raise")
    with pytest.raises(InfrastructureError, match="not everything was sent"):
        sync(folder.path, [f"trackers.0.trouble={tmp_path}/trouble"])


def test_a_run_that_cannot_start_leaves_no_trace(run_with: Any, tmp_path: Path, told: list[str]) -> None:
    run, folder = run_with()
    Trackers(run, folder, goes_on=False, tell=told.append).__enter__().close(2, "there is no such model")
    assert (diary(tmp_path), told) == ([], [])
