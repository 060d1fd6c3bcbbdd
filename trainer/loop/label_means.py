"""What the labels of a step hold in the mean, by the reports of who made them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from configs.section import MAIN
from trainer.types import RankBatch, UnitReport


def label_means(reports: Iterable[UnitReport]) -> dict[str, float]:
    """`mass` (NaN of no row), and `entropy` where every encoding tells it, over all rows."""
    made = [report for report in reports if report.num_rows]
    rows = sum(report.num_rows for report in made)
    means = {"mass": sum(r.mean_mass * r.num_rows for r in made) / rows if rows else math.nan}
    if made and all(report.mean_entropy is not None for report in made):
        means["entropy"] = sum(r.mean_entropy * r.num_rows for r in made) / rows
    return means


def means_of_tasks(batches: Iterable[RankBatch], reports: Mapping[str, UnitReport]) -> dict[str, float]:
    """`task/<task>/mass` and `entropy` of named tasks with labels in the step; `reports` by what was asked."""
    of_tasks: dict[str, list[UnitReport]] = {}
    for unit in (unit for batch in batches for unit in batch.units if unit.kind[0] != MAIN):
        made = [reports[one.id] for one in unit.asked() if one.id in reports]
        of_tasks.setdefault(unit.kind[0], []).extend(made)
    return {
        f"task/{task}/{name}": value
        for task, made in of_tasks.items()
        if any(report.num_rows for report in made)
        for name, value in label_means(made).items()
    }
