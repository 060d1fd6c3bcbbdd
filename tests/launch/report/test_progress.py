"""What people read while a run works, on a terminal and in a log file; and the speed and shares in it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from launch.log_level import LogLevel
from launch.report.hours import EXPECTED, LEFT, USED
from launch.report.metrics import STUDENT_WAIT, TEACHER_WAIT, TOKENS_PER_S, MetricsLog, Timeline, read_metrics
from launch.report.numbers import duration
from launch.report.observer import RunObserver
from launch.report.progress import Progress
from trainer.run_folder import RunFolder
from trainer.types import Evaluation, StepMetrics


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def evaluation(step: int, kl: float, agreement: float = 0.5) -> Evaluation:
    return Evaluation(
        step=step, num_rows=9, forward_kl=kl, agreement=agreement, perplexity=20.0, teacher_perplexity=8.0
    )


def plain_run(steps: int, seconds_per_step: float, level: LogLevel = LogLevel.info) -> list[str]:
    text, clock = io.StringIO(), Clock()
    with Progress(steps, console=Console(file=text, width=40), clock=clock, level=level, device="GPU") as progress:
        progress.phase("teachers: loading [weights]")
        clock.now += 12.3
        first = evaluation(0, 6.31, 0.061)
        progress.evaluation(first, None)
        progress.detail("checkpoint: at_step 2")
        for number in range(1, steps + 1):
            clock.now += seconds_per_step
            values = {"train/loss": 2.0, TOKENS_PER_S: 1234.4, STUDENT_WAIT: 0.25, TEACHER_WAIT: 0.5}
            if number >= 4:
                values |= {LEFT: (steps - number) * seconds_per_step, USED: 0.6, EXPECTED: 6.7}
            progress.step(StepMetrics(number, values))
        progress.evaluation(evaluation(steps, 1.05, 0.56), first)
    return text.getvalue().splitlines()


def test_a_log_level_leaves_out_what_is_below_it() -> None:
    begun = {
        level: [line.strip("[ ").split(" ")[0] for line in plain_run(steps=9, seconds_per_step=1.0, level=level)]
        for level in LogLevel
    }
    steps = ["step"] * 4  # three and the last
    assert begun[LogLevel.debug] == ["0.0", "evaluation", "12.3", *["step"] * 9, "evaluation"]
    assert begun[LogLevel.info] == ["0.0", "evaluation", *steps, "evaluation"]
    assert begun[LogLevel.warning] == ["evaluation", "evaluation"]
    assert begun[LogLevel.error] == []


def test_plain_output_is_sparse_and_complete() -> None:
    lines = plain_run(steps=100, seconds_per_step=1.0)
    steps = [line for line in lines if line.startswith("step ")]
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in steps]
    assert shown == [1, 2, 3, *range(13, 100, 10), 100]
    assert lines[0] == "[   0.0 s]  teachers: loading [weights]"
    assert "KL 6.310 nats/token, agreement 6.1%" in lines[1]
    assert lines[-1] == (
        "evaluation at step 100: KL 6.310 -> 1.050 nats/token, agreement 6.1% -> 56.0%, "
        "perplexity 20.00 -> 20.00 (teacher 8.00)"
    )


def test_probability_on_ids_that_do_not_exist_is_shown_where_there_is_some() -> None:
    text = io.StringIO()
    with Progress(1, console=Console(file=text, width=400), clock=Clock()) as progress:
        before = replace(evaluation(0, 6.0), padding_mass=0.11)
        progress.evaluation(before, None)
        progress.evaluation(replace(evaluation(1, 1.0), padding_mass=0.0001), before)
    first, last = text.getvalue().splitlines()
    assert first.endswith("(teacher 8.00), on ids that do not exist 11.0%")
    assert last.endswith("(teacher 8.00), on ids that do not exist 11.0% -> 0.0%")


def test_a_plain_step_line_says_where_the_run_is() -> None:
    lines = plain_run(steps=100, seconds_per_step=30.0)
    assert lines[11] == (
        "step 10/100  1,234 tokens/s  loss 2.000  KL 6.310 at step 0  "
        "waiting: student 25%, teacher 50%  ETA 45 min 00 s  0.6 of 6.7 GPU-hours"
    )
    assert lines[2].endswith("teacher 50%  ETA -"), "nothing is said before it is known"
    assert not any("\x1b" in line for line in lines)


def test_a_terminal_gets_one_live_block_and_the_lines_that_stay() -> None:
    text, clock = io.StringIO(), Clock()
    console = Console(file=text, width=100, force_terminal=True, legacy_windows=False, _environ={"TERM": "xterm"})
    with Progress(10, console=console, clock=clock) as progress:
        progress.phase("student: loading")
        clock.now += 3.0
        progress.step(StepMetrics(1, {"train/loss": 2.0}))
        progress.note("scorer-0 is restarted [red]")
    shown = text.getvalue()
    assert "student: loading  3.0 s" in shown
    assert "scorer-0 is restarted [red]" in shown
    assert "step 1/10" in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (59.7, "1 min 00 s"), (7500, "2 h 05 min"), (273600, "3 d 04 h")]
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_observer_adds_speed_and_wait_shares_by_hand_computed_values(tmp_path: Path) -> None:
    folder, clock = RunFolder.create(tmp_path / "run"), Clock()
    observer = RunObserver(
        metrics=MetricsLog(folder),
        timeline=Timeline(folder),
        progress=Progress(3, console=Console(file=io.StringIO()), clock=clock),
        clock=clock,
    )
    for number in range(3):  # each step: 1 s waiting, 3 s training; the teacher works 2 s of every 4
        start = 1000.0 + 4 * number
        observer.span("scorer-0", "score", start, start + 2.0)
        observer.span("student", "wait", start, start + 1.0)
        observer.span("student", "train", start + 1.0, start + 4.0)
        clock.now = start + 4.0
        observer.step(StepMetrics(number + 1, {"train/loss": 1.0, "train/tokens": 800.0}))
    observer.close()
    values = read_metrics(folder).steps[2].values
    assert values[TOKENS_PER_S] == pytest.approx(200.0)
    assert values[STUDENT_WAIT] == pytest.approx(0.25)
    # a unit of 2 s that began after 1010 would not be known yet: busy 1000-1002, 1004-1006, 1008-1010 of 1000-1010
    assert values[TEACHER_WAIT] == pytest.approx(0.4)


def test_a_resumed_run_compares_with_the_evaluation_of_its_first_attempt(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    first = MetricsLog(folder)
    first.evaluation(evaluation(0, 6.0))
    first.step(StepMetrics(1, {"train/loss": 1.0}))
    first.close()
    log, text = MetricsLog(folder), io.StringIO()
    log.resume(1)
    progress = Progress(2, console=Console(file=text))
    RunObserver(metrics=log, timeline=Timeline(folder), progress=progress).evaluation(evaluation(2, 1.0), "during")
    assert "KL 6.000 -> 1.000" in text.getvalue()
