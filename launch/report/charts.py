"""Which charts the report shows, and which numbers of the log are in them."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from launch.report.metrics import (
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    STUDENT_WAIT,
    TEACHER_WAIT,
    TOKENS_PER_S,
    Records,
    is_term,
)
from launch.report.numbers import percent
from launch.report.plots import Series, line_chart

_COLOURS = ("c2", "c3", "c4", "c5")


def charts(records: Records) -> list[Markup]:
    """In the order of the page; a chart without numbers is left out."""
    pictures = [*_quality(records), *_training(records)]
    return [picture for picture in pictures if picture]


def _quality(records: Records) -> list[Markup]:
    return [
        line_chart("Held-out KL to the teacher (nats per token)", [_held_out(records, "forward_kl")], from_zero=True),
        line_chart(
            "Held-out agreement (both put the same token first)",
            [_held_out(records, "agreement")],
            from_zero=True,
            form=percent,
        ),
        line_chart(
            "Held-out perplexity",
            [_held_out(records, "perplexity", "student"), _held_out(records, "teacher_perplexity", "teacher")],
            logarithmic=True,
        ),
    ]


def _training(records: Records) -> list[Markup]:
    return [
        line_chart("Training loss (nats per token)", _losses(records)),
        line_chart("Speed (tokens per second)", [_logged(records, TOKENS_PER_S, "tokens/s")], from_zero=True),
        line_chart(
            "Waiting (share of the last ten steps)",
            [
                _logged(records, STUDENT_WAIT, "student"),
                _logged(records, TEACHER_WAIT, "teacher", colour="teacher"),
            ],
            from_zero=True,
            form=percent,
        ),
        line_chart("Learning rate", [_logged(records, LEARNING_RATE, "learning rate", colour="c4")], from_zero=True),
        line_chart("Gradient norm before clipping", [_logged(records, GRAD_NORM, "norm", colour="c3")], from_zero=True),
    ]


def _losses(records: Records) -> Sequence[Series]:
    """The total, and its terms where there are several."""
    names = sorted({name for step in records.steps for name in step.values if is_term(name)})
    total = _logged(records, LOSS, "total")
    if len(names) < 2:
        return [total]
    terms = (
        _logged(
            records,
            name,
            name.removeprefix("train/").removeprefix("task/").replace("_", " "),
            colour=_COLOURS[i % len(_COLOURS)],
        )
        for i, name in enumerate(names)
    )
    return [total, *terms]


def _held_out(records: Records, field: str, name: str = "student") -> Series:
    return Series(
        name=name,
        x=tuple(evaluation.step for evaluation in records.evaluations),
        y=tuple(getattr(evaluation, field) for evaluation in records.evaluations),
        colour="teacher" if name == "teacher" else "student",
        dashed=name == "teacher",
        markers=len(records.evaluations) <= 40 and name != "teacher",
    )


def _logged(records: Records, key: str, name: str, *, colour: str = "student") -> Series:
    steps = [step for step in records.steps if key in step.values]
    return Series(name=name, x=tuple(s.step for s in steps), y=tuple(s.values[key] for s in steps), colour=colour)
