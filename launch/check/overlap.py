"""Whether held-out rows ask what rows ask that are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from cluster.preflight.finding import Finding, warning
from trainer.data.prompt_keys import UNREADABLE, keys_of
from trainer.data.rows import Rows
from trainer.data.streamed import StreamedRows

LOOKED_AT = 50_000
"""Rows of each dataset; of a larger one they are spread evenly."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Rows that `check` has opened, and what to call them."""

    subject: str
    place: str
    rows: Rows


def overlaps(held_out: list[Opened], training: list[Opened]) -> Iterator[Finding]:
    """A warning for each set of held-out rows of which some are trained on too."""
    if not held_out:
        return
    trained = _first_of_each(training)
    looked = _looked_at(training)
    for one in held_out:
        numbers = _spread(one.rows)
        keys = _keys(one.rows, numbers)
        common = [place for place, key in enumerate(keys) if key != UNREADABLE and int(key) in trained]
        if common:
            rows, number = trained[int(keys[common[0]])]
            text = (
                f"{len(common)} of {len(numbers)} held-out rows ask what a training row asks (case and spaces aside), "
                "so they tell less of what the student makes of new ones: "
                f"{one.rows.raw.origin(numbers[common[0]])} and {rows.raw.origin(number)}; looked at {looked}"
            )
            yield warning(one.subject, f"{one.place}: {text}")


def _first_of_each(training: list[Opened]) -> Mapping[int, tuple[Rows, int]]:
    """By the key of a prompt: where it stands first."""
    found: dict[int, tuple[Rows, int]] = {}
    for one in training:
        numbers = _spread(one.rows)
        for number, key in zip(numbers, _keys(one.rows, numbers), strict=True):
            found.setdefault(int(key), (one.rows, number))
    return found


def _keys(rows: Rows, numbers: list[int]) -> np.ndarray:
    """uint64 [n]; rows of which a fraction is held out have been read for it."""
    return keys_of(rows, numbers).keys if rows.prompt_keys is None else rows.prompt_keys[numbers]


def _looked_at(training: list[Opened]) -> str:
    total = sum(len(one.rows) for one in training)
    seen = sum(len(_spread(one.rows)) for one in training)
    if any(isinstance(one.rows.raw, StreamedRows) for one in training):
        return f"{seen} training rows, of a stream the first ones"
    return f"all {total} training rows" if seen == total else f"{seen} of {total} training rows"


def _spread(rows: Rows) -> list[int]:
    if len(rows) <= LOOKED_AT:
        return list(range(len(rows)))
    return [int(number) for number in np.linspace(0, len(rows) - 1, LOOKED_AT)]
