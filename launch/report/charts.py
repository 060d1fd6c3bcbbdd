"""Which charts the report shows, and which numbers of the log are in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle

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
    held_out, logged = partial(_held_out, records), partial(_logged, records)
    perplexities = [held_out("perplexity"), held_out("teacher_perplexity", "teacher")]
    waits = [logged(STUDENT_WAIT, "student"), logged(TEACHER_WAIT, "teacher", colour="teacher")]
    pictures = [
        line_chart("Held-out KL to the teacher (nats per token)", [held_out("forward_kl")], from_zero=True),
        line_chart(
            "Held-out agreement (both put the same token first)", [held_out("agreement")], from_zero=True, form=percent
        ),
        line_chart("Held-out perplexity", perplexities, logarithmic=True),
        line_chart("Training loss (nats per token)", _losses(records)),
        line_chart("Speed (tokens per second)", [logged(TOKENS_PER_S, "tokens/s")], from_zero=True),
        line_chart("Waiting (share of the last ten steps)", waits, from_zero=True, form=percent),
        line_chart("Learning rate", [logged(LEARNING_RATE, "learning rate", colour="c4")], from_zero=True),
        line_chart("Gradient norm before clipping", [logged(GRAD_NORM, "norm", colour="c3")], from_zero=True),
    ]
    return [picture for picture in pictures if picture]


def _losses(records: Records) -> Sequence[Series]:
    """The total, and its terms where there are several."""
    names = sorted({name for step in records.steps for name in step.values if is_term(name)})
    total = _logged(records, LOSS, "total")
    if len(names) < 2:
        return [total]
    shown = (name.removeprefix("train/").removeprefix("task/").replace("_", " ") for name in names)
    terms = (
        _logged(records, name, text, colour=colour)
        for name, text, colour in zip(names, shown, cycle(_COLOURS), strict=False)
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
