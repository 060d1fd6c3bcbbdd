"""The numbers of a run for Prometheus, through the metrics that every node of a Ray cluster serves.

    RunObserver --steps, evaluations, events--> Exported --ray.util.metrics--> the node's agent --HTTP--> Prometheus

The names are those of docs/metrics.md in the alphabet of Prometheus: `train/loss` is `stillhouse_train_loss`. Ray adds
`ray_` in front, and Prometheus `_total` behind what is summed. Labels are the run, and the task or teacher of a value
that belongs to one: as many as the configuration names. What is not finite is left out, as Ray does by itself.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

from trainer.metric_names import metric_of

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge, Histogram

Kind = Literal["gauge", "counter", "histogram"]

PREFIX = "stillhouse_"
SPREAD = "step/seconds"
SECONDS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Upper ends of the histogram's buckets; a longer step is in the last one, which has no end."""

EVENTS = frozenset(
    ("redispatch", "teacher_restart", "teacher_lost", "students_lost", "students_restarted", "labels_lost")
) | frozenset(("save_failed", "checkpoint", "non_finite_step", "empty_step"))
"""Those that are counted, in `stillhouse_events`."""

STEP, STEPS, EVENT = f"{PREFIX}train_step", f"{PREFIX}train_steps", f"{PREFIX}events"


@dataclass(frozen=True, slots=True)
class Series:
    """What one value is in Prometheus."""

    name: str  # without `ray_` and `_total`
    kind: Kind
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def exposed(self) -> str:
        """The name under which Prometheus finds it. Of a histogram its buckets: Ray makes its sum of their middles."""
        return f"ray_{self.name}" + {"gauge": "", "counter": "_total", "histogram": "_bucket"}[self.kind]


@cache
def series_of(name: str) -> Series:
    """Of a value by its name in metrics.jsonl: `task/chat/jsd` is `stillhouse_task_jsd{task="chat"}`. Values of an
    evaluation have a task each, "" for all rows together."""
    known = metric_of(name)
    kind: Kind = "histogram" if name == SPREAD else "counter" if known is not None and known.summed else "gauge"
    area, slash, rest = name.partition("/")
    labels = {}
    if area == "evaluation":
        labels["task"] = ""
        if rest.startswith("task/"):
            labels["task"], rest = rest.removeprefix("task/").rsplit("/", 1)
    elif area in ("task", "teacher") and "/" in rest:
        labels[area], rest = rest.rsplit("/", 1)
    return Series(PREFIX + re.sub(r"\W", "_", f"{area}{slash}{rest}", flags=re.ASCII), kind, labels)


class Exported:
    """Of one run, whose process is connected to a Ray cluster; `close` before it leaves.

    Ray forgets a gauge that was not set for two of its report intervals, so a thread sets each again to its last value:
    steps may take minutes.
    """

    def __init__(self, run: str, *, total_steps: int, again_s: float | None = None) -> None:
        """`again_s`: between two times that gauges are set; None: half an interval of Ray's reports."""
        self._run = run
        self._metrics: dict[str, Gauge | Counter | Histogram] = {}
        self._gauges: dict[tuple[str, ...], tuple[Gauge, float, dict[str, str]]] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, args=(again_s,), daemon=True, name="metrics")
        self._record(Series(STEPS, "gauge"), total_steps)
        self._thread.start()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._record(Series(STEP, "gauge"), step)
        self._values(values)

    def evaluation(self, values: Mapping[str, float]) -> None:
        """`values` by the names of an evaluation's numbers, `evaluation/` in front."""
        self._values(values)

    def event(self, name: str) -> None:
        if name in EVENTS:
            self._record(Series(EVENT, "counter", {"event": name}), 1)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _values(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._record(series_of(name), value)

    def _record(self, series: Series, value: float) -> None:
        if not math.isfinite(value):
            return
        labels = {"run": self._run, **series.labels}
        if series.name not in self._metrics:
            self._metrics[series.name] = _made(series, tuple(labels))
        metric = self._metrics[series.name]
        if series.kind == "gauge":
            metric.set(value, tags=labels)
            with self._lock:
                self._gauges[series.name, *labels.values()] = metric, value, labels
        elif series.kind == "histogram":
            metric.observe(value, tags=labels)
        elif value > 0:  # nothing to add otherwise, and Ray refuses it
            metric.inc(value, tags=labels)

    def _repeat(self, again_s: float | None) -> None:
        while not self._over.wait(again_s or _report_interval_s() / 2):
            with self._lock:
                for gauge, value, labels in self._gauges.values():
                    gauge.set(value, tags=labels)


def _made(series: Series, labels: tuple[str, ...]) -> Gauge | Counter | Histogram:
    from ray.util.metrics import Counter, Gauge, Histogram

    about = f"{series.name.removeprefix(PREFIX)} of a run of Stillhouse"
    if series.kind == "histogram":
        return Histogram(series.name, about, boundaries=list(SECONDS), tag_keys=labels)
    return (Gauge if series.kind == "gauge" else Counter)(series.name, about, tag_keys=labels)


def _report_interval_s() -> float:
    """Of Ray's processes; it takes none below a second."""
    import ray

    return max(ray._config.metrics_report_interval_ms(), 1000) / 1000
