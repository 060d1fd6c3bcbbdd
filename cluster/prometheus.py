"""The numbers of a run for Prometheus, through the metrics that every node of a Ray cluster serves.

    RunObserver --steps, evaluations, events--> Exported --ray.util.metrics--> the node's agent --HTTP--> Prometheus

The names are those of metrics.jsonl in Prometheus' alphabet: `train/loss` is `stillhouse_train_loss`, to which Ray adds
`ray_` in front, and Prometheus `_total` behind what is summed. Labels are the run, and the task or teacher of a value
that belongs to one: as many as the configuration names. What is not finite is left out, as Ray does by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge, Histogram

Kind = Literal["gauge", "counter", "histogram"]

PREFIX = "stillhouse_"
SUMMED = re.compile(
    r"train/(tokens|loss_tokens|skipped|micro_batches)|step/sequences|labels/(rows|bytes)|answers/\w+|scorer/score_s"
    r"|task/[^/]+/(sequences|loss_tokens)|teacher/[^/]+/tokens|student/\w+_s"
)
"""Values of one step whose sum over the steps means something."""

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


def series_of(name: str) -> Series:
    """Of a value by its name in metrics.jsonl: `task/chat/jsd` is `stillhouse_task_jsd{task="chat"}`. Values of an
    evaluation have a task each, "" for all rows together."""
    kind: Kind = "histogram" if name == SPREAD else "counter" if SUMMED.fullmatch(name) else "gauge"
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
    """Of one run, whose process is connected to a Ray cluster. Makes each metric when it has its first value."""

    def __init__(self, run: str, *, total_steps: int) -> None:
        self._run = run
        self._metrics: dict[str, Gauge | Counter | Histogram] = {}
        self._record(Series(STEPS, "gauge"), total_steps)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._record(Series(STEP, "gauge"), step)
        self._values(values)

    def evaluation(self, values: Mapping[str, float]) -> None:
        """`values` by the names of an evaluation's numbers, `evaluation/` in front."""
        self._values(values)

    def event(self, name: str) -> None:
        if name in EVENTS:
            self._record(Series(EVENT, "counter", {"event": name}), 1)

    def _values(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._record(series_of(name), value)

    def _record(self, series: Series, value: float) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        labels = {"run": self._run, **series.labels}
        if series.name not in self._metrics:
            about, keys = f"{series.name.removeprefix(PREFIX)} of a run of Stillhouse", tuple(labels)
            if series.kind == "histogram":
                made = Histogram(series.name, about, boundaries=list(SECONDS), tag_keys=keys)
            else:
                made = (Gauge if series.kind == "gauge" else Counter)(series.name, about, tag_keys=keys)
            self._metrics[series.name] = made
        metric = self._metrics[series.name]
        if not math.isfinite(value):
            return
        if isinstance(metric, Gauge):
            metric.set(value, tags=labels)
        elif isinstance(metric, Histogram):
            metric.observe(value, tags=labels)
        elif value > 0:  # nothing to add otherwise, and Ray refuses it
            metric.inc(value, tags=labels)
