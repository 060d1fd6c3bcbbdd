"""The metrics log: complete lines, every step once after a resume, sinks that say the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from launch.report.metrics import MetricsLog, TensorBoardSink, Timeline, is_term, read_metrics
from trainer.run_folder import RunFolder, read_lines
from trainer.types import Evaluation, StepMetrics


class ListSink:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def scalars(self, step: int, values: Mapping[str, float], *, time_s: float) -> None:
        self.calls.append((step, dict(values), time_s))

    def resume(self, step: int) -> None:
        self.calls.append(("resume", step))

    def close(self) -> None:
        self.calls.append(("close",))


def evaluation(step: int, kl: float = 1.0) -> Evaluation:
    return Evaluation(
        step=step, num_rows=10, forward_kl=kl, agreement=0.5, perplexity=9.0, teacher_perplexity=8.0, samples=()
    )


def step(number: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(number, {"train/loss": loss})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def test_a_term_of_a_user_is_one_by_its_dotted_name() -> None:
    names = ("train/my_terms.gap", "task/chat/my_terms.gap_2", "train/loss", "train/tokens", "teacher/a/tokens")
    assert [is_term(name) for name in names] == [True, True, False, False, False]


def test_every_record_is_on_disk_before_the_next_one(folder: RunFolder) -> None:
    log = MetricsLog(folder, clock=lambda: 12.5)
    log.evaluation(evaluation(0, kl=6.0))
    log.step(step(1, 2.5))
    log.event("teacher_lost", replica="scorer-0")
    assert list(read_lines(folder.metrics)) == [
        {
            "time": 12.5,
            "kind": "evaluation",
            "step": 0,
            "num_rows": 10,
            "forward_kl": 6.0,
            "agreement": 0.5,
            "perplexity": 9.0,
            "teacher_perplexity": 8.0,
            "padding_mass": 0.0,
        },
        {"time": 12.5, "kind": "step", "step": 1, "train/loss": 2.5},
        {"time": 12.5, "kind": "event", "step": 1, "name": "teacher_lost", "replica": "scorer-0"},
    ]


def test_an_evaluation_of_several_tasks_comes_back_with_each_and_without_what_nobody_scored(
    folder: RunFolder,
) -> None:
    alone = Evaluation(4, 5, None, None, 12.0, None)
    several = replace(evaluation(4), tasks={"chat+code": evaluation(4, kl=2.0), "sft": alone})
    log = MetricsLog(folder)
    log.evaluation(several)
    (line,) = read_lines(folder.metrics)
    assert (line["forward_kl"], line["task/chat+code/forward_kl"], line["task/sft/perplexity"]) == (1.0, 2.0, 12.0)
    assert "task/sft/forward_kl" not in line
    assert read_metrics(folder).evaluations == (several,)


def test_a_number_that_is_not_finite_stays_json_and_is_named(folder: RunFolder) -> None:
    log = MetricsLog(folder)
    log.step(step(1, math.inf))
    line = json.loads(folder.metrics.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line["train/loss"] is None
    assert line["non_finite"] == {"train/loss": "inf"}
    assert math.isnan(read_metrics(folder).steps[0].values["train/loss"])


def test_a_resumed_log_holds_every_step_once_and_keeps_events(folder: RunFolder) -> None:
    first = MetricsLog(folder)
    first.evaluation(evaluation(0, kl=6.0))
    for number in range(1, 6):
        first.step(step(number))
    first.evaluation(evaluation(5))
    first.event("students_lost", at_step=6)
    first.close()
    with folder.metrics.open("a") as file:
        file.write('{"kind": "step", "st')  # killed while writing

    sink = ListSink()
    second = MetricsLog(folder, [sink])
    second.resume(3)
    assert second.first_evaluation == evaluation(0, kl=6.0)
    for number in range(4, 7):
        second.step(step(number, loss=0.5))
    second.close()

    records = read_metrics(folder)
    lines = [r["step"] for r in read_lines(folder.metrics) if r["kind"] == "step"]
    assert lines == [1, 2, 3, 4, 5, 6]
    assert [s.values["train/loss"] for s in records.steps] == [1, 1, 1, 0.5, 0.5, 0.5]
    assert [e.step for e in records.evaluations] == [0]
    assert [e.name for e in records.events] == ["students_lost"]
    assert sink.calls[0] == ("resume", 3)
    assert sink.calls[-1] == ("close",)


def test_a_run_that_begins_again_replaces_the_steps_of_the_attempt_before(folder: RunFolder) -> None:
    for kl in (6.0, 5.0):
        log = MetricsLog(folder)
        log.evaluation(evaluation(0, kl=kl))
        log.step(step(1))
        log.close()
    assert [r["kind"] for r in read_lines(folder.metrics)] == ["evaluation", "step"]
    assert read_metrics(folder).evaluations == (evaluation(0, kl=5.0),)


def test_an_event_may_not_hide_the_fields_of_the_log(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="step"):
        MetricsLog(folder).event("x", step=3)


def test_tensorboard_files_hold_the_same_numbers_also_after_a_resume(folder: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(folder, [TensorBoardSink(folder)], clock=lambda: 100.0)
    for number in (1, 2, 3):
        log.step(step(number, loss=float(number)))
    log.evaluation(evaluation(3, kl=0.25))
    log.resume(2)
    log.step(step(3, loss=30.0))
    log.close()
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_the_timeline_refuses_a_kind_nobody_would_draw(folder: RunFolder) -> None:
    timeline = Timeline(folder)
    timeline.span("student", "train", 1.0, 2.0, "step 1")
    with pytest.raises(ValueError, match="sleep"):
        timeline.span("student", "sleep", 1.0, 2.0)  # type: ignore[arg-type]
    assert list(read_lines(folder.timeline)) == [
        {"lane": "student", "kind": "train", "start_s": 1.0, "stop_s": 2.0, "label": "step 1"}
    ]


def test_an_evaluation_made_again_after_a_resume_is_in_the_log_once(folder: RunFolder) -> None:
    log = MetricsLog(folder)
    for number in (1, 2, 3):
        log.step(step(number))
    log.evaluation(evaluation(3, kl=2.0))
    log.close()
    sink = ListSink()
    log = MetricsLog(folder, [sink])
    log.resume(3)
    log.evaluation(evaluation(3, kl=2.0))
    log.evaluation(evaluation(6, kl=1.0))
    assert [record["step"] for record in read_lines(folder.metrics) if record["kind"] == "evaluation"] == [3, 6]
    assert [call[0] for call in sink.calls] == ["resume", 6]
