"""Trackio on this machine, with its database as the reader."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from trackers_of import evaluation, followed, step

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
    (file,) = (tmp_path / "trackio").glob("distil*.db")
    with sqlite3.connect(file) as database:
        rows = [
            (run, at, json.loads(values))
            for run, at, values in database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        ]
    assert {run for run, _, _ in rows} == {json.loads((tmp_path / "run/trackers/id.json").read_text())["id"]}
    assert rows[0][2]["evaluation/forward_kl"] == 0.5
    steps = [(at, values["train/loss"]) for _, at, values in rows[1:]]
    assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, -1.0), (7, -1.0)]
