"""MLflow, in a database file, with its own client as the reader."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from trackers_of import evaluation, followed, step

from launch.report.metrics import MetricsLog
from launch.trackers import trackers

mlflow = pytest.importorskip("mlflow")


def test_a_run_that_goes_on_is_one_run_with_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 200.0)  # on a busy machine a new database takes a minute
    told: list[str] = []
    uri = f"sqlite:///{tmp_path}/all.db"
    tracker = {"kind": "mlflow", "tracking_uri": uri, "experiment": "distil", "tags": {"team": "a"}}
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
            log.step(step(number, loss=math.inf))
        log.close()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("distil").experiment_id])
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in points[:5]] == [(n, float(n)) for n in range(1, 6)]
    assert [one.step for one in points[5:]] == [6, 7]
    assert min(one.value for one in points[5:]) > 1e300, "a database has no infinity: MLflow writes its largest number"
    assert client.get_metric_history(run.info.run_id, "evaluation/forward_kl")[0].value == 0.5
    assert (run.info.run_name, run.info.status, run.data.tags["team"]) == ("tiny", "FINISHED", "a")
    assert run.data.params["training.steps"] == "9"
    assert run.data.params["teacher.model.path"] == "t"
    assert run.data.tags["stillhouse.exit_code"] == "0"
    assert told == [f"mlflow: mlflow ui --backend-store-uri {uri}"] * 2
