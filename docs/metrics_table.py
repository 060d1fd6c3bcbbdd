"""docs/metrics.md, made from the contract: `python docs/metrics_table.py > docs/metrics.md`."""

from __future__ import annotations

from trainer.metric_names import METRICS, Metric

HEAD = """# Metrics

Made from `trainer/metric_names.py` by `python docs/metrics_table.py`. Every number of a run has one name, in
`metrics.jsonl`, in the trackers ([tracking](tracking.md)) and, in Prometheus' alphabet, [there](monitoring.md).
`<task>` and `<teacher>` are names of the configuration, `<term>` is a kind of loss ([objectives](objectives.md)) or the
module of one of yours. A number is absent where the run has nothing of it: `answers/` where no model writes, `rollout/`
and `sync/` where the student does not, `task/` and `teacher/` where there is only one. A step's numbers are of that
step alone, all ranks together, unless its meaning says otherwise.

`metrics.jsonl` has one JSON object a line: `time` (Unix seconds), `kind` (`step`, `evaluation` or `event`), `step`, and
the numbers by name. A number that is not finite is `null` there, and named with its value under `non_finite`. A resumed
run removes the lines after its checkpoint, so every step is in it once.
"""

AFTER = """
## Events

Lines of kind `event` have a `name` and fields of their own: `resumed`, `checkpoint`, `teacher_restart`,
`students_lost`, `save_failed`, `non_finite_step`, `note` and others. They are history, and stay when a run goes on.
Trackers get numbers alone.
"""


def metrics_table() -> str:
    """The page."""
    parts = [HEAD]
    for title, kind in (("Of a step", "step"), ("Of an evaluation", "evaluation")):
        parts += [f"\n## {title}\n", "| name | unit | meaning |\n|---|---|---|"]
        parts += [_row(metric) for metric in METRICS if metric.kind == kind]
    return "\n".join(parts) + "\n" + AFTER


def _row(metric: Metric) -> str:
    return f"| `{metric.name}` | {metric.unit} | {metric.meaning} |"


if __name__ == "__main__":
    print(metrics_table(), end="")
