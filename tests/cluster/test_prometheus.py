"""The names under which Prometheus finds the numbers of a run, and the dashboard that asks for them."""

from __future__ import annotations

import io
import json
import re
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.lifecycle.ray_session import refuse_used_port
from cluster.prometheus import EVENT, EVENTS, STEP, STEPS, Series, series_of
from launch.report import metrics
from launch.report.observer import RunObserver
from launch.report.progress import Progress
from trainer.errors import ConfigError
from trainer.metric_names import METRICS
from trainer.run_folder import RunFolder
from trainer.types import Evaluation, StepMetrics

NAMES = {
    "train/loss": ("ray_stillhouse_train_loss", {}),
    "train/tokens": ("ray_stillhouse_train_tokens_total", {}),
    "train/learning_rate": ("ray_stillhouse_train_learning_rate", {}),
    "train/my_terms.half-kl_2": ("ray_stillhouse_train_my_terms_half_kl_2", {}),
    "throughput/tokens_per_s": ("ray_stillhouse_throughput_tokens_per_s", {}),
    "labels/bytes": ("ray_stillhouse_labels_bytes_total", {}),
    "labels/mass": ("ray_stillhouse_labels_mass", {}),
    "step/seconds": ("ray_stillhouse_step_seconds_bucket", {}),
    "student/wait_s": ("ray_stillhouse_student_wait_s_total", {}),
    "answers/cut_off": ("ray_stillhouse_answers_cut_off_total", {}),
    "task/chat/jsd": ("ray_stillhouse_task_jsd", {"task": "chat"}),
    "task/chat/loss_tokens": ("ray_stillhouse_task_loss_tokens_total", {"task": "chat"}),
    "teacher/big/tokens": ("ray_stillhouse_teacher_tokens_total", {"teacher": "big"}),
    "teacher/big/token_share": ("ray_stillhouse_teacher_token_share", {"teacher": "big"}),
    "evaluation/forward_kl": ("ray_stillhouse_evaluation_forward_kl", {"task": ""}),
    "evaluation/task/a.b/forward_kl": ("ray_stillhouse_evaluation_forward_kl", {"task": "a.b"}),
}
EXPOSED = re.compile(r"ray_stillhouse_\w+")


EXAMPLES = [
    metric.name.replace("<task>", "chat").replace("<teacher>", "big").replace("<term>", "jsd") for metric in METRICS
]
"""One name of each entry of docs/metrics.md."""


def dashboard() -> dict[str, Any]:
    return json.loads(Path(metrics.__file__).with_name("grafana.json").read_text())


def expressions() -> list[str]:
    queries = [variable["query"] for variable in dashboard()["templating"]["list"]]
    variables = [query["query"] for query in queries if isinstance(query, dict)]
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]] + variables


@pytest.mark.parametrize("name", NAMES)
def test_a_value_has_one_name_in_prometheus(name: str) -> None:
    series = series_of(name)
    assert (series.exposed, series.labels) == NAMES[name]
    assert re.fullmatch(r"[a-z_][a-zA-Z0-9_]*", series.exposed)


def test_no_two_numbers_of_the_contract_share_a_series() -> None:
    series = [(one.exposed, *sorted(one.labels.items())) for one in map(series_of, EXAMPLES)]
    assert len(set(series)) == len(series)
    kinds = {metric.name: series_of(name).kind for metric, name in zip(METRICS, EXAMPLES, strict=True)}
    assert {name for name, kind in kinds.items() if kind == "counter"} == {one.name for one in METRICS if one.summed}


def test_every_expression_of_the_dashboard_asks_for_what_a_run_exports() -> None:
    known = {series_of(name).exposed for name in EXAMPLES}
    known |= {Series(STEP, "gauge").exposed, Series(STEPS, "gauge").exposed, Series(EVENT, "counter").exposed}
    asked = [(name, expression) for expression in expressions() for name in EXPOSED.findall(expression)]
    assert len(asked) > 20
    assert [(name, expression) for name, expression in asked if name not in known] == []


def test_what_is_summed_is_asked_for_as_a_rate_and_nothing_else_is() -> None:
    for expression in expressions():
        for name in EXPOSED.findall(expression):
            rated = re.search(rf"(rate|increase)\({name}\{{", expression) is not None
            assert rated == name.endswith(("_total", "_bucket")), expression


def test_panels_have_places_of_their_own() -> None:
    panels = dashboard()["panels"]
    cells = [
        (place["x"] + dx, place["y"] + dy)
        for place in (panel["gridPos"] for panel in panels)
        for dx in range(place["w"])
        for dy in range(place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_events_are_a_bounded_number_of_series() -> None:
    assert len(EVENTS) == 10
    assert "note" not in EVENTS


def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"report.prometheus_port: {port} cannot be listened at"):
            refuse_used_port(port)
    refuse_used_port(port)


class Heard:
    """What an `Exported` is told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.over = False

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self.names += [series_of(name).exposed for name in values]

    def evaluation(self, values: Mapping[str, float]) -> None:
        self.names += [series_of(name).exposed for name in values]

    def event(self, name: str) -> None:
        self.names.append(name)

    def close(self) -> None:
        self.over = True


def test_the_observer_hands_on_every_number_by_its_name(tmp_path: Path) -> None:
    heard, folder = Heard(), RunFolder(tmp_path)
    log, timeline = metrics.MetricsLog(folder), metrics.Timeline(folder)
    with Progress(3, console=Console(file=io.StringIO())) as progress:
        observer = RunObserver(metrics=log, timeline=timeline, progress=progress, exported=heard)
        observer.step(StepMetrics(1, {"train/loss": 2.0}))
        one = Evaluation(1, num_rows=3, forward_kl=0.5, agreement=0.5, perplexity=9.0, teacher_perplexity=8.0)
        observer.evaluation(replace(one, tasks={"chat": one}), "during")
        observer.event("teacher_restart", replica="scorer-0", reason="gone", restarts=1)
        observer.close()
    assert heard.names[0] == "ray_stillhouse_train_loss"
    assert heard.names.count("ray_stillhouse_evaluation_forward_kl") == 2
    assert heard.names[-1] == "teacher_restart"
    assert heard.over
