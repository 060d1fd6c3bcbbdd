"""A run that serves metrics: what Prometheus reads there is what the run writes down."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from runs_under_fault import finish, losses, start, when
from tiny_runs import tiny_run

from cluster.prometheus import series_of
from cluster.runtime import free_port
from launch.report.metrics import read_metrics
from trainer.run_folder import RunFolder

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1200)]


def served(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Our samples by name; empty while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    except urllib.error.URLError:
        return {}
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_stillhouse_"):
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_what_prometheus_reads_is_what_the_run_writes_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    port, run = free_port(), RunFolder(tmp_path / "run")
    process = start(
        tiny_run(
            tmp_path,
            {
                "student": {"ranks": 1},
                "training": {"steps": 4000, "save_every": 0, "save_every_minutes": 0},
                "optimizer": {"schedule": "constant"},
                "report": {"generate": 0, "viewer_sequences": 0, "prometheus_port": port},
            },
        )
    )
    when(run.path, lambda: 5 in losses(run.path), process)
    deadline = time.monotonic() + 120
    while "ray_stillhouse_train_step" not in (found := served(port)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.5)
    process.terminate()
    code, output = finish(process)
    assert code == 75, output
    assert f":{port}/metrics" in output, "who may read it is said"
    records = read_metrics(run)
    ((labels, step),) = found["ray_stillhouse_train_step"]
    assert labels["run"] == "tiny"
    assert found["ray_stillhouse_train_steps"][0][1] == 4000
    at = records.steps[int(step) - 1]
    assert at.step == step
    for name in ("train/loss", "train/grad_norm", "wait/student_share", "throughput/tokens_per_s"):
        ((_, value),) = found[series_of(name).exposed]
        near = [one.values.get(name) for one in records.steps[int(step) - 3 : int(step) + 3]]
        assert any(value == pytest.approx(one, rel=1e-6) for one in near if one is not None), name
    for name in ("train/tokens", "labels/bytes", "step/sequences"):
        ((_, value),) = found[series_of(name).exposed]
        sums = [sum(one.values[name] for one in records.steps[:last]) for last in range(int(step) - 3, int(step) + 3)]
        assert any(value == pytest.approx(one) for one in sums), name
    buckets = {labels["le"]: value for labels, value in found["ray_stillhouse_step_seconds_bucket"]}
    assert abs(buckets["+Inf"] - step) <= 3
    (before,) = (value for labels, value in found["ray_stillhouse_evaluation_forward_kl"] if labels["task"] == "")
    assert before == pytest.approx(records.evaluations[0].forward_kl)
