"""Trackio on this machine, with its database as the reader."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trackers_of import evaluation, followed, step, wait_for

from launch.report.metrics import MetricsLog

pytest.importorskip("trackio")


def test_a_run_that_goes_on_is_one_run_with_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    tracker = {"kind": "trackio", "project": "distil"}
    with followed(tmp_path, tracker, told) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        log.evaluation(evaluation(0))
        for number in range(1, 6):
            log.step(step(number, loss=float(number)))
        log.close()
    with followed(tmp_path, tracker, told, goes_on=True) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        log.resume(4)
        for number in range(5, 8):
            log.step(step(number, loss=-1.0))
        log.close()
    assert told == ["trackio: trackio show --project distil"] * 2
    rows = rows_of(tmp_path / "trackio")
    assert {run for run, _, _ in rows} == {json.loads((tmp_path / "run/trackers/id.json").read_text())["id"]}
    assert rows[0][2]["evaluation/forward_kl"] == 0.5
    steps = [(at, values["train/loss"]) for _, at, values in rows[1:]]
    assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, -1.0), (7, -1.0)]


def rows_of(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    """(run, step, values) of the database of a project; none before it is made."""
    file = folder / "distil.db"
    if not file.exists():
        return []
    with sqlite3.connect(file) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'metrics'").fetchall():
            return []
        found = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(run, at, json.loads(values)) for run, at, values in found]


SERVE = """
import sys, time, trackio
trackio.show(open_browser=False, block_thread=False, host="127.0.0.1", server_port=int(sys.argv[1]))
time.sleep(600)
"""
Server = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Server]]:
    """(address, what starts Trackio's own server there); its token is in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        said = tmp_path / f"server-{len(started)}.txt"
        with said.open("w") as output:
            environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "server"), "PYTHONUNBUFFERED": "1"}
            command = [sys.executable, "-c", SERVE, str(port)]
            started.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment, text=True))
        wait_for(lambda: re.search(r"write_token=(\S+)", said.read_text()), 120)
        (token,) = set(re.findall(r"write_token=(\S+)", said.read_text()))
        monkeypatch.setenv("TRACKIO_WRITE_TOKEN", token)
        return started[-1]

    yield f"http://127.0.0.1:{port}", start
    for process in started:
        process.kill()
        process.wait()


def test_a_server_that_dies_in_the_middle_is_told_and_a_resumed_run_sends_what_is_missing(
    server: tuple[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, start = server
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    told: list[str] = []
    tracker = {"kind": "trackio", "project": "distil", "server_url": url}
    process = start()
    with followed(tmp_path, tracker, told) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        for number in (1, 2):
            log.step(step(number))
        wait_for(lambda: len(rows_of(tmp_path / "server")) == 2)
        process.kill()
        process.wait()
        log.step(step(3))
        wait_for(lambda: len(told) == 2)
        log.close()
    assert told[0] == f"trackio: {url}"
    assert told[1].startswith(f"trackio: {url} cannot be reached: ")
    assert told[1].endswith("; the run goes on, and what is missing there is sent when that succeeds")
    assert told[2].endswith("; what came after step 2 is not there, and is in metrics.jsonl")
    start()
    with followed(tmp_path, tracker, told, goes_on=True) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        log.resume(3)
        log.step(step(4))
        log.close()
    assert [at for _, at, _ in rows_of(tmp_path / "server")] == [1, 2, 3, 4]
    assert len({run for run, _, _ in rows_of(tmp_path / "server")}) == 1
