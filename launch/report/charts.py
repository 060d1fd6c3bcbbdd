"""Which charts the report shows, and which numbers of the log are in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import cycle

from markupsafe import Markup

from configs.losses import LOSSES
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
from launch.report.numbers import compact, percent
from launch.report.plots import Series, line_chart

_COLOURS = ("c2", "c3", "c4", "c5")


def charts(records: Records) -> list[Markup]:
    """In the order of the page; a chart without numbers is left out."""
    logged = partial(_logged, records)
    waits = [logged(STUDENT_WAIT, "student"), logged(TEACHER_WAIT, "teacher", colour="teacher")]
    pictures = [
        *_quality(records),
        *_labels(records),
        line_chart(f"Training loss ({_unit_of_loss(records)})", _losses(records)),
        line_chart("Speed (tokens per second)", [logged(TOKENS_PER_S, "tokens/s")], from_zero=True),
        line_chart("Waiting (share of the last ten steps)", waits, from_zero=True, form=percent),
        line_chart("Learning rate", [logged(LEARNING_RATE, "learning rate", colour="c4")], from_zero=True),
        line_chart("Gradient norm before clipping", [logged(GRAD_NORM, "norm", colour="c3")], from_zero=True),
    ]
    return [picture for picture in pictures if picture]


def _quality(records: Records) -> list[Markup]:
    """Of all held-out rows, and where they are of several tasks, of each."""
    of_tasks = sorted({name for evaluation in records.evaluations for name in evaluation.tasks})
    whole = "all tasks" if of_tasks else "student"
    kl, agreement, perplexity = (
        [_held_out(records, field, whole), *_held_out_of_tasks(records, field, of_tasks)]
        for field in ("forward_kl", "agreement", "perplexity")
    )
    if not of_tasks:
        perplexity.append(_held_out(records, "teacher_perplexity", "teacher"))
    entropy = [
        _held_out(records, "student_entropy", whole),
        _held_out(records, "teacher_entropy", "teacher"),
        *_held_out_of_tasks(records, "student_entropy", of_tasks),
    ]
    return [
        line_chart("Held-out KL to the teacher (nats per token)", kl, from_zero=True),
        line_chart("Held-out agreement (both put the same token first)", agreement, from_zero=True, form=percent),
        line_chart("Held-out perplexity", perplexity, logarithmic=True),
        line_chart("Held-out entropy (nats per token)", entropy),
    ]


def _labels(records: Records) -> list[Markup]:
    """What the labels of the steps hold, of several tasks each; nothing of a run whose labels say none of it."""
    pictures = []
    for name, title, form in (
        ("mass", "Teacher's probability in the labels", percent),
        ("entropy", "Entropy of the labels (nats per token)", compact),
    ):
        keys = sorted(
            {key for step in records.steps for key in step.values if re.fullmatch(rf"task/[^/]+/{name}", key)}
        )
        lines = [_logged(records, f"labels/{name}", "all tasks" if keys else "labels", colour="teacher")]
        lines += [
            _logged(records, key, key.split("/")[1], colour=colour)
            for key, colour in zip(keys, cycle(_COLOURS), strict=False)
        ]
        pictures.append(line_chart(title, lines, form=form))
    return pictures


def _unit_of_loss(records: Records) -> str:
    """A term of whole answers, such as dpo, is no mean over tokens."""
    terms = {name.rpartition("/")[2] for step in records.steps for name in step.values if is_term(name)}
    of_answers = {LOSSES.kind_of(term) for term in LOSSES.built_in if term.form == "sequence"}
    return "nats" if {re.sub(r"_\d+$", "", term) for term in terms} & of_answers else "nats per token"


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


def _held_out_of_tasks(records: Records, field: str, tasks: Sequence[str]) -> list[Series]:
    return [
        _held_out(records, field, name, colour=_COLOURS[i % len(_COLOURS)], task=name) for i, name in enumerate(tasks)
    ]


def _held_out(
    records: Records, field: str, name: str = "student", *, colour: str = "student", task: str | None = None
) -> Series:
    """Of a task, or of all; without the evaluations that did not measure it."""
    found = [(one.step, one if task is None else one.tasks.get(task)) for one in records.evaluations]
    points = [(step, getattr(one, field)) for step, one in found if one is not None]
    points = [(step, value) for step, value in points if value is not None]
    return Series(
        name=name,
        x=tuple(step for step, _ in points),
        y=tuple(value for _, value in points),
        colour="teacher" if name == "teacher" else colour,
        dashed=name == "teacher",
        markers=len(points) <= 40 and name != "teacher",
    )


def _logged(records: Records, key: str, name: str, *, colour: str = "student") -> Series:
    steps = [step for step in records.steps if key in step.values]
    return Series(name=name, x=tuple(s.step for s in steps), y=tuple(s.values[key] for s in steps), colour=colour)
