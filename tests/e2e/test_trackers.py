"""A whole run with all trackers, killed and started again: each tracker's own reader finds every number of the log
under its name, each step once, in one run."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from runs_under_fault import finish, start
from tiny_runs import records, stillhouse, tiny_run
from wandb_file import history
from wandb_file import records as wandb_records

for library in ("tensorboard", "wandb", "mlflow", "trackio"):
    pytest.importorskip(library)

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

KILLED_AFTER_STEP_5 = """
import os, signal, time
from pathlib import Path
from launch.cli import main
from launch.report.observer import RunObserver

told = RunObserver.step

def told_and_killed(self, metrics):
    told(self, metrics)
    if metrics.step == 5:
        while not all(file.exists() and '"step": 5' in file.read_text() for file in STATES):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

RunObserver.step = told_and_killed
"""
NO_NUMBERS = {"time", "kind", "step", "non_finite"}
Curves = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after step 5, when all trackers had it, and went on after step 4."""
    folder = tmp_path_factory.mktemp("tracked")
    trackers = ["tensorboard", {"kind": "wandb", "mode": "offline"}, "mlflow", {"kind": "trackio", "project": "tiny"}]
    changes = {
        "runtime": "in_process",
        "student": {"ranks": 1},
        "training": {"steps": 8, "save_every": 2, "evaluate_every": 2},
        "trackers": trackers,
    }
    config = tiny_run(folder, changes)
    states = [folder / f"run/trackers/{name}.json" for name in ("tensorboard", "wandb", "mlflow", "trackio")]
    code = KILLED_AFTER_STEP_5 + f"STATES = [Path(name) for name in {[str(state) for state in states]}]\nmain()\n"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRACKIO_DIR", str(folder / "trackio"))
        killed, output = finish(start(config, code=code))
        assert killed == -signal.SIGKILL, output
        result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed after step 4" in result.stdout
    assert "metrics.jsonl" not in result.stdout, "nothing is missing at any tracker"
    return folder / "run"


def logged(run: Path) -> Curves:
    """Every curve of metrics.jsonl."""
    curves: Curves = {}
    for kind in ("step", "evaluation"):
        for record in records(run, kind):
            for name in record.keys() - NO_NUMBERS:
                curves.setdefault(name, []).append((record["step"], record[name]))
    return curves


def of_rows(rows: list[tuple[int, dict[str, Any]]]) -> Curves:
    curves: Curves = {}
    for step, values in rows:
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def assert_same_curves(found: Curves, run: Path) -> None:
    """But for what the clock says of step 5, which was trained twice."""
    found, expected = without_clock(found), without_clock(logged(run))
    assert {name: [step for step, _ in points] for name, points in found.items()} == {
        name: [step for step, _ in points] for name, points in expected.items()
    }
    for name, points in expected.items():
        for (step, value), (_, there) in zip(points, found[name], strict=True):
            assert there == pytest.approx(value, rel=1e-6), f"{name} at step {step}"


def without_clock(curves: Curves) -> Curves:
    of_the_clock = ("student/", "step/seconds", "scorer/", "wait/", "throughput/", "run/")
    return {
        name: [(step, value) for step, value in points if step != 5 or not name.startswith(of_the_clock)]
        for name, points in curves.items()
    }


def test_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = events.Tags()["scalars"]
    assert_same_curves({name: [(one.step, one.value) for one in events.Scalars(name)] for name in names}, run)


def test_wandb(run: Path) -> None:
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    told = [record.run for file in files for record in wandb_records(file) if record.HasField("run")]
    assert {one.run_id for one in told} == {json.loads((run / "trackers/id.json").read_text())["id"]}
    rows = [row for file in files for row in history(file)]
    kept = [(row["_step"], {k: v for k, v in row.items() if not k.startswith("_")}) for row in rows]
    assert_same_curves(of_rows(kept), run)


def test_mlflow(run: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("stillhouse").experiment_id])
    assert found.info.status == "FINISHED"
    names = found.data.metrics
    curves = {name: client.get_metric_history(found.info.run_id, name) for name in names}
    assert_same_curves({name: [(one.step, one.value) for one in points] for name, points in curves.items()}, run)


def test_trackio(run: Path) -> None:
    (file,) = (run.parent / "trackio").glob("tiny*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
        assert len(database.execute("SELECT DISTINCT run_name FROM metrics").fetchall()) == 1
    assert_same_curves(of_rows([(step, json.loads(values)) for step, values in rows]), run)
