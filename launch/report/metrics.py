"""The numbers of a run on disk: metrics.jsonl, which trackers follow (`launch/trackers`), and the timeline.

One JSON object a line: `{"time", "kind": "step" | "evaluation" | "event", "step", ...}`. A number that is not finite is
written as null and named under `"non_finite"`, so that the file stays JSON and nothing is hidden. The log of a resumed
run holds every step and evaluation once; events are history and are kept.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from trainer.metric_names import TERM
from trainer.records import MAX_INTEGER, append_lines, ignore, read_lines
from trainer.run_folder import RunFolder, plain, write_text
from trainer.types import Evaluation, StepMetrics

SpanKind = Literal["train", "ids", "sync", "score", "generate", "stage", "evaluate", "save", "start", "wait"]
"""In the order in which a report shows them."""

LOSS = "train/loss"
"""Names of step values that people are shown."""
_TERM = re.compile(rf"(?:train|task/[^/]+)/{TERM}(?:/[^/]+)?")
TOKENS = "train/tokens"
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"
TOKENS_PER_S = "throughput/tokens_per_s"
STUDENT_WAIT = "wait/student_share"
TEACHER_WAIT = "wait/teacher_share"

_LARGEST = 1e100
"""Of a number that is read back: charts calculate with sums, quotients and margins of them."""

EVALUATION = "evaluation/"
EVALUATION_FIELDS = (
    "num_rows",
    "forward_kl",
    "agreement",
    "perplexity",
    "teacher_perplexity",
    "padding_mass",
    "student_entropy",
    "teacher_entropy",
    "aligned_rows",
)
_EVALUATED = re.compile(
    rf"(?:task/(?P<task>[^/]+)/)?(?:teacher/(?P<teacher>[^/]+)/forward_kl|(?P<field>{'|'.join(EVALUATION_FIELDS)}))"
)
_OF_TEACHERS = ("forward_kl", "agreement", "teacher_perplexity", "aligned_rows")  # left out where none scored the rows
NOTICEABLE_PADDING = 5e-4
"""The share of a student's probability on ids that do not exist from which on people are shown it."""


def is_term(name: str) -> bool:
    """Whether a step value is a term of an objective, unweighted: `train/jsd`, a second one
    of its kind `train/jsd_2`, of a task among several `task/chat/jsd`, of a teacher among several `train/jsd/big`."""
    return _TERM.fullmatch(name) is not None


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    """Its numbers by name, `forward_kl`; of a task among several `task/chat/forward_kl`. What nobody scored is left
    out."""
    of = {"": evaluation} | {f"task/{name}/": one for name, one in evaluation.tasks.items()}
    values = {f"{at}{name}": getattr(one, name) for at, one in of.items() for name in EVALUATION_FIELDS}
    each = {f"{at}teacher/{name}/forward_kl": kl for at, one in of.items() for name, kl in one.teachers.items()}
    return {name: value for name, value in values.items() if value is not None} | each


def _evaluation(step: int, values: Mapping[str, float]) -> Evaluation:
    """Raises ValueError for values that `evaluation_values` does not give."""
    tasks: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        found = _EVALUATED.fullmatch(name.removeprefix(EVALUATION))  # older versions wrote names without it
        if found is None:
            continue
        of_task = tasks.setdefault(found["task"] or "", {})
        if found["teacher"]:
            of_task.setdefault("teachers", {})[found["teacher"]] = value
        else:
            of_task[found["field"]] = value
    blank = dict.fromkeys(_OF_TEACHERS)
    try:
        total = Evaluation(step, **(blank | tasks.pop("", {})))
        of_tasks = {name: Evaluation(step, **(blank | fields)) for name, fields in tasks.items()}
    except TypeError as error:
        raise ValueError(f"an evaluation of another shape: {error}") from None
    return replace(total, tasks=of_tasks)


class MetricsLog:
    """Writes metrics.jsonl, one flushed line per record. Trackers follow the file (`launch/trackers`)."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        clock: Callable[[], float] = time.time,
        tell: Callable[[str], None] = ignore,
        rewound: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`tell` gets a sentence for each line of an earlier attempt that cannot be read, `rewound` the step after
        which the log goes on, when the file has nothing later."""
        self._tell = tell
        self._path = folder.metrics
        self._rewound = rewound
        self._clock = clock
        self._step = 0
        self._has_begun = False
        self._evaluated: set[int] = set()  # steps whose evaluation is in the log
        self.first_evaluation: Evaluation | None = None
        """Of the whole run, not of this attempt: what later ones are compared with."""
        self._file = append_lines(self._path)

    def resume(self, step: int) -> None:
        """Go on after `step`: later steps and evaluations are removed, and lines that cannot be read, in one atomic
        replacement of the file.

        Without it, the first step or evaluation that is logged removes what an earlier attempt wrote from there on.
        """
        self._file.close()
        found = read_lines(self._path, _logged, tell=self._tell)
        kept = [logged for logged in found if isinstance(logged.item, Event) or logged.item.step <= step]
        write_text(self._path, "".join(_line(logged.record) for logged in kept))
        self._file = append_lines(self._path)
        self._step = max(step, 0)
        self._has_begun = True
        evaluations = _in_order(kept).evaluations
        self.first_evaluation = evaluations[0] if evaluations else None
        self._evaluated = {evaluation.step for evaluation in evaluations}
        self._rewound(step)

    def step(self, metrics: StepMetrics) -> None:
        self._begin(metrics.step)
        self._step = metrics.step
        self._scalars("step", metrics.step, metrics.values)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Its numbers; the samples go to samples.json (`launch.report.page.sample_records`). One that was made again
        after a resume is in the log already."""
        self._begin(evaluation.step)
        if evaluation.step in self._evaluated:
            return
        self._evaluated.add(evaluation.step)
        self.first_evaluation = self.first_evaluation or evaluation
        values = {f"{EVALUATION}{name}": value for name, value in evaluation_values(evaluation).items()}
        self._scalars("evaluation", evaluation.step, values)

    def event(self, name: str, **fields: Any) -> None:
        """Something that happened after the last logged step; `fields` are JSON values of your choice."""
        taken = sorted({"time", "kind", "step"} & fields.keys())
        if taken:
            raise ValueError(f"event {name!r}: the fields {taken} are set by the log itself, use other names")
        self._write({"time": self._clock(), "kind": "event", "step": self._step, "name": name, **plain(fields)})

    def close(self) -> None:
        self._file.close()

    def _begin(self, step: int) -> None:
        if not self._has_begun:
            self.resume(step - 1)

    def _scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        record: dict[str, Any] = {"time": self._clock(), "kind": kind, "step": step, **plain(dict(values))}
        non_finite = {name: str(float(value)) for name, value in values.items() if not math.isfinite(value)}
        if non_finite:
            record["non_finite"] = non_finite
        self._write(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()


class Timeline:
    """Who was busy when: timeline.jsonl, `{"lane", "kind", "start_s", "stop_s", "label"}` a line, wall clock seconds.

    A lane is one process or group: `student`, `scorer-0`, `generator-1`. Lanes named `student...` are the student, all
    others are teachers. Spans of one lane may overlap (a replica has two units in flight). `wait` spans are shown;
    shares are computed from the other kinds, so a lane need not record its waiting.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._file = append_lines(folder.timeline)

    def span(self, lane: str, kind: SpanKind, start_s: float, stop_s: float, label: str = "") -> None:
        if kind not in get_args(SpanKind):
            raise ValueError(f"timeline: kind {kind!r} is not one of {', '.join(get_args(SpanKind))}")
        record = {"lane": lane, "kind": kind, "start_s": round(start_s, 6), "stop_s": round(stop_s, 6), "label": label}
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class Event:
    """A line of kind `event`, as read back."""

    time_s: float
    step: int
    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Records:
    """metrics.jsonl as read back: steps and evaluations in order, each step once (the last line wins)."""

    steps: tuple[StepMetrics, ...]
    evaluations: tuple[Evaluation, ...]
    events: tuple[Event, ...]


def read_metrics(folder: RunFolder, *, tell: Callable[[str], None] = ignore) -> Records:
    """Empty records where there is no file. Numbers that were not finite come back as NaN. `tell` gets a sentence for
    each line that cannot be read. Raises OSError."""
    return _in_order(read_lines(folder.metrics, _logged, tell=tell))


@dataclass(frozen=True, slots=True)
class _Logged:
    """A line of the file, as JSON and decoded."""

    record: Mapping[str, Any]
    item: StepMetrics | Evaluation | Event


def _in_order(lines: Iterable[_Logged]) -> Records:
    items = [logged.item for logged in lines]
    steps = {item.step: item for item in items if isinstance(item, StepMetrics)}
    evaluations = {item.step: item for item in items if isinstance(item, Evaluation)}
    return Records(
        steps=tuple(steps[s] for s in sorted(steps)),
        evaluations=tuple(evaluations[s] for s in sorted(evaluations)),
        events=tuple(item for item in items if isinstance(item, Event)),
    )


def _logged(record: Mapping[str, Any]) -> _Logged:
    """Raises ValueError for a line that this log does not write."""
    kind, step = record.get("kind"), record.get("step")
    if type(step) is not int or not 0 <= step < MAX_INTEGER:
        raise ValueError(f"step: must be a whole number from 0 on, not {step!r:.40}")
    rest = {k: v for k, v in record.items() if k not in ("kind", "step", "time", "non_finite")}
    if kind == "event":
        return _Logged(record, _event(record, step, rest))
    values = {name: _number(name, value) for name, value in rest.items()}
    if kind == "step":
        return _Logged(record, StepMetrics(step=step, values=values))
    if kind != "evaluation":
        raise ValueError(f"kind: must be step, evaluation or event, not {kind!r:.40}")
    return _Logged(record, _evaluation(step, values))


def _event(record: Mapping[str, Any], step: int, rest: dict[str, Any]) -> Event:
    time_s, name = record.get("time"), rest.pop("name", None)
    if not isinstance(name, str) or isinstance(time_s, bool) or not isinstance(time_s, int | float):
        raise ValueError("an event has a name, which is text, and a time, which is a number")
    return Event(time_s=time_s, step=step, name=name, fields=rest)


def _number(name: str, value: Any) -> float:
    """NaN for null, and for what no chart could show beside others."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{name}: must be a number or null, not {value!r:.40}")
    return value if value is not None and abs(value) <= _LARGEST else math.nan


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
