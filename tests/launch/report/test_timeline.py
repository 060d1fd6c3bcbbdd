"""Wait shares against values computed by hand and against a brute-force clock."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from launch.report.intervals import seconds_inside, subtract, union
from launch.report.metrics import Timeline
from launch.report.timeline import (
    MAX_DRAWN_SPANS,
    Span,
    TimeAxis,
    draw,
    mean_waiting,
    read_timeline,
    steady_windows,
    wait_shares,
)
from trainer.run_folder import RunFolder


def hand_made() -> list[Span]:
    """Ten seconds a step: 2 waiting, 8 training; after step 3 an evaluation of 20 s, in which nobody is to blame."""
    spans, now = [Span("student", "start", 0, 100), Span("scorer-0", "start", 0, 90)], 100.0
    for step in range(1, 6):
        spans += [Span("student", "wait", now, now + 2), Span("student", "train", now + 2, now + 10, f"step {step}")]
        spans += [Span("student", "stage", now + 1, now + 3)]
        spans += [Span("scorer-0", "score", now, now + 4), Span("scorer-0", "score", now + 2, now + 6)]  # 6 s of 10
        spans += [Span("scorer-1", "score", now, now + 1)]  # 1 s of 10
        now += 10
        if step == 3:
            spans.append(Span("student", "evaluate", now, now + 20))
            now += 20
    return spans


def test_shares_of_a_hand_made_timeline() -> None:
    spans = hand_made()
    assert steady_windows(spans) == [(110, 130), (150, 170)]
    student, first, second = wait_shares(spans)
    assert (student.lane, first.lane, second.lane) == ("student", "scorer-0", "scorer-1")
    assert (student.busy, student.waiting) == (pytest.approx(0.8), pytest.approx(0.2))
    assert student.kinds["wait"] == pytest.approx(0.2)
    assert student.kinds["stage"] == pytest.approx(0.2)
    assert first.waiting == pytest.approx(0.4)
    assert second.waiting == pytest.approx(0.9)
    assert mean_waiting((student, first, second), student=True) == pytest.approx(0.2)
    assert mean_waiting((student, first, second), student=False) == pytest.approx(0.65)


def test_the_night_between_two_attempts_is_nobodys_waiting() -> None:
    late = [
        Span(s.lane, s.kind, s.start_s + 40_000, s.stop_s + 40_000, s.label) for s in hand_made() if s.start_s >= 100
    ]
    student = wait_shares([*hand_made(), *late])[0]
    assert student.waiting == pytest.approx(0.2, abs=0.01)
    axis = TimeAxis.of([*hand_made(), *late])
    assert axis.segments == ((0, 170), (40_100, 40_170))
    assert axis.length_s == 240


def test_what_a_start_of_the_run_does_before_its_first_step_is_nobodys_waiting() -> None:
    first = [s for s in hand_made() if s.kind != "evaluate"]
    again = 20.0  # shorter than a pause that the picture leaves out
    last = max(s.stop_s for s in first)
    second = [Span(s.lane, s.kind, s.start_s + last + again - 100, s.stop_s + last + again - 100) for s in first[2:]]
    tests = [Span("scorer-0", "score", last + 5, last + 15)]
    student = wait_shares([*first, *tests, *second])[0]
    assert student.waiting == pytest.approx(0.2)


def test_too_few_steps_have_no_steady_state() -> None:
    spans = [span for span in hand_made() if span.stop_s <= 150]
    assert wait_shares(spans) == ()
    assert mean_waiting((), student=True) is None


def test_interval_arithmetic_agrees_with_counting_every_second() -> None:
    rng = random.Random(0)
    for _ in range(200):
        intervals = [(a, a + rng.randrange(0, 9)) for a in (rng.randrange(0, 50) for _ in range(6))]
        holes = [(a, a + rng.randrange(0, 9)) for a in (rng.randrange(0, 50) for _ in range(3))]
        window = (rng.randrange(0, 20), rng.randrange(20, 60))
        inside = {t for a, b in intervals for t in range(a, b)}
        outside = {t for a, b in holes for t in range(a, b)}
        left = {t for t in range(*window) if t not in outside}
        windows = subtract(window, holes)
        assert windows == union(windows)
        assert sum(b - a for a, b in windows) == len(left)
        assert seconds_inside(intervals, windows) == pytest.approx(len(inside & left))


def test_a_timeline_is_read_back_in_order_and_drawn(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    timeline = Timeline(folder)
    for span in reversed(hand_made()):
        timeline.span(span.lane, span.kind, span.start_s, span.stop_s, span.label)  # type: ignore[arg-type]
    spans = read_timeline(folder)
    assert [s.start_s for s in spans] == sorted(s.start_s for s in hand_made())
    ((caption, picture),) = draw(spans)
    assert "every phase" in caption
    assert picture.count('class="k-train"') == 5
    assert "train step 3: 8.00 s" in picture


def test_a_long_run_is_drawn_as_shares_and_a_close_up() -> None:
    spans, now = [], 0.0
    for step in range(MAX_DRAWN_SPANS):
        spans += [Span("student", "train", now, now + 1, f"step {step}"), Span("scorer-0", "score", now, now + 0.5)]
        now += 1
    (whole, picture), (close, _) = draw(spans)
    assert "share of each slice" in whole
    assert "close-up" in close
    assert picture.count("<rect") < 3000
    assert draw([]) == []
