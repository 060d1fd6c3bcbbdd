"""The metrics log: complete lines, every step once after a resume, followers that hear of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from launch.report.metrics import MetricsLog, Timeline, is_term, read_metrics
from trainer.run_folder import RunFolder, read_lines
from trainer.types import Evaluation, StepMetrics


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
            "evaluation/num_rows": 10,
            "evaluation/forward_kl": 6.0,
            "evaluation/agreement": 0.5,
            "evaluation/perplexity": 9.0,
            "evaluation/teacher_perplexity": 8.0,
            "evaluation/padding_mass": 0.0,
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
    names = ("forward_kl", "task/chat+code/forward_kl", "task/sft/perplexity")
    assert [line[f"evaluation/{name}"] for name in names] == [1.0, 2.0, 12.0]
    assert "evaluation/task/sft/forward_kl" not in line
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

    rewound: list[int] = []
    second = MetricsLog(folder, rewound=rewound.append)
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
    assert rewound == [3]


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


def test_evaluations_that_an_older_version_wrote_are_read(folder: RunFolder) -> None:
    numbers = {"num_rows": 5, "perplexity": 9.0, "padding_mass": 0.0}
    of_task = {f"task/chat/{name}": value for name, value in numbers.items()}
    line = {"time": 1.0, "kind": "evaluation", "step": 2, **numbers, **of_task}
    folder.metrics.write_text(json.dumps(line) + "\n")
    chat = Evaluation(2, 5, None, None, 9.0, None)
    assert read_metrics(folder).evaluations == (replace(chat, tasks={"chat": chat}),)


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
    log = MetricsLog(folder)
    log.resume(3)
    log.evaluation(evaluation(3, kl=2.0))
    log.evaluation(evaluation(6, kl=1.0))
    assert [record["step"] for record in read_lines(folder.metrics) if record["kind"] == "evaluation"] == [3, 6]
