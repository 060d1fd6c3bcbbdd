"""What tasks and teachers have of a run, as tables: nothing where there is one of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch.report.metrics import Records, is_term
from launch.report.numbers import Form, compact, percent
from trainer.types import Evaluation

IN_SUM = "all"


@dataclass(frozen=True, slots=True)
class Table:
    """Texts; the first cell of a row is its heading."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(records: Records) -> list[Table]:
    """In the order of the page."""
    return [table for table in (_trained(records), _asked(records), _held_out(records)) if table.rows]


def _trained(records: Records) -> Table:
    names = _named(records, "task/", "/loss_tokens")
    sequences, tokens = (_sums(records, "task/", f"/{what}") for what in ("sequences", "loss_tokens"))
    rows = [
        (name, *_part(sequences, name), *_part(tokens, name), "; ".join(_terms(records, f"task/{name}/")))
        for name in names
    ]
    columns = ("task", "sequences", "of all", "tokens in the loss", "of all", "terms, first and last step")
    return Table("What was trained of each task", columns, tuple(rows))


def _asked(records: Records) -> Table:
    tokens = _sums(records, "teacher/", "/tokens")
    names, columns = _named(records, "teacher/", "/tokens"), ("teacher", "tokens", "of all")
    rows = [(name, *_part(tokens, name)) for name in names]
    if together := _named(records, "teacher/", "/weight"):
        columns = (*columns, "mean weight", "tokens not judged, since it was lost")
        rows = [
            (*row, *(_together(records, name) if name in together else ("-", "-")))
            for name, row in zip(names, rows, strict=True)
        ]
    return Table("What was asked of each teacher", columns, tuple(rows))


def _together(records: Records, name: str) -> tuple[str, str]:
    """What a teacher counts for beside others on the same tokens, and what it missed."""
    weights = [step.values[key] for step in records.steps if (key := f"teacher/{name}/weight") in step.values]
    finite = [weight for weight in weights if math.isfinite(weight)]
    lost = _sums(records, "teacher/", "/lost_rows").get(name, 0.0)
    return percent(math.fsum(finite) / len(finite), 3) if finite else "-", f"{lost:,.0f}"


def _held_out(records: Records) -> Table:
    columns = ("held-out rows of", "tokens", "KL to teacher", "same first choice", "perplexity", "of the teacher")
    measured = [one for one in records.evaluations if one.tasks]
    if not measured:
        return Table("", columns, ())
    first, last = measured[0], measured[-1]
    pairs = [(name, first.tasks.get(name), last.tasks.get(name)) for name in last.tasks]
    rows = [_quality(name, before, now) for name, before, now in [*pairs, (IN_SUM, first, last)] if before and now]
    return Table("How well each task is learned, before and now", columns, tuple(rows))


def _quality(name: str, before: Evaluation, now: Evaluation) -> tuple[str, ...]:
    return (
        name,
        f"{now.num_rows:,}",
        change(before.forward_kl, now.forward_kl, compact),
        change(before.agreement, now.agreement, percent),
        change(before.perplexity, now.perplexity, compact),
        "-" if now.teacher_perplexity is None else compact(now.teacher_perplexity),
    )


def change(before: float | None, now: float | None, form: Form) -> str:
    """`6.31 → 1.05`; a dash where nobody measured it."""
    if before is None or now is None:
        return "-"
    return form(now, 3) if before == now else f"{form(before, 3)} → {form(now, 3)}"


def _terms(records: Records, area: str) -> Iterable[str]:
    """Each term of a task with its first and its last value."""
    names = dict.fromkeys(
        name for step in records.steps for name in step.values if name.startswith(area) and is_term(name)
    )
    for name in names:
        values = [step.values[name] for step in records.steps if math.isfinite(step.values.get(name, math.nan))]
        if values:
            yield f"{name.removeprefix(area).replace('_', ' ')} {change(values[0], values[-1], compact)}"


def _named(records: Records, before: str, after: str) -> Sequence[str]:
    """What stands between `before` and `after` in the names of step values, in order of appearance."""
    names = dict.fromkeys(name for step in records.steps for name in step.values)
    return [name[len(before) : -len(after)] for name in names if name.startswith(before) and name.endswith(after)]


def _sums(records: Records, before: str, after: str) -> dict[str, float]:
    return {
        name: math.fsum(step.values.get(f"{before}{name}{after}", 0.0) for step in records.steps)
        for name in _named(records, before, after)
    }


def _part(sums: Mapping[str, float], name: str) -> tuple[str, str]:
    """A sum, and its share of all sums."""
    total = math.fsum(sums.values())
    value = sums.get(name, math.nan)
    return compact(value), percent(value / total) if total else "-"
