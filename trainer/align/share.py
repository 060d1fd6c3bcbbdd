"""How much of the answers the labels of a teacher with another tokenizer reach, in numbers and as a limit."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence

from trainer.errors import DataError
from trainer.types import Coverage, Sequence

LEAST_BYTES = 1000
"""Of answers, before their share is judged: one unlucky row is no rule."""


class AlignedShare:
    """Of each task with `align`, since the run began or went on."""

    def __init__(self, min_ratio: Mapping[str, float]) -> None:
        """By task."""
        self._min_ratio = min_ratio
        self._found: dict[str, Coverage] = {}

    def add(self, sequences: AbstractSequence[Sequence], *, least_bytes: int = LEAST_BYTES) -> None:
        """Raises `DataError` where a task has at least so many bytes, and too few of them are aligned."""
        for task, more in covered(sequences).items():
            self._found[task] = self._found.get(task, Coverage()).plus(more)
        for task, found in self._found.items():
            wanted = self._min_ratio.get(task, 0.0)
            if found.num_bytes >= least_bytes and found.byte_ratio < wanted:
                raise DataError(
                    f"only {described(found)} of the answers of task {task} are aligned with the teacher's tokens, and "
                    f"align.min_ratio is {wanted:g}: the vocabularies have too little in common for this method, or "
                    "the chat templates render answers differently; write align: chunks (with labels: token), or a "
                    "lower min_ratio if you accept that the rest is not learnt from the teacher"
                )

    @property
    def found(self) -> Mapping[str, Coverage]:
        """By task."""
        return self._found


def covered(sequences: AbstractSequence[Sequence]) -> dict[str, Coverage]:
    """By task, of the sequences that are aligned."""
    found: dict[str, Coverage] = {}
    for sequence in sequences:
        if sequence.reading is not None:
            found[sequence.task] = found.get(sequence.task, Coverage()).plus(sequence.reading.coverage)
    return found


def described(coverage: Coverage) -> str:
    """`81.2% of the bytes and 33.0% of the digits`."""
    digits = coverage.digit_ratio
    return f"{coverage.byte_ratio:.1%} of the bytes" + ("" if digits is None else f" and {digits:.1%} of the digits")


def align_metrics(sequences: AbstractSequence[Sequence]) -> dict[str, float]:
    """Of the aligned sequences of a step, all tasks together."""
    total = Coverage()
    for one in covered(sequences).values():
        total = total.plus(one)
    readings = [sequence.reading for sequence in sequences if sequence.reading is not None]
    if not readings:
        return {}
    rows, reached = sum(len(one.groups) for one in readings), sum(int((one.groups >= 0).sum()) for one in readings)
    metrics = {"align/byte_ratio": total.byte_ratio, "align/row_ratio": reached / rows}
    return metrics if total.digit_ratio is None else metrics | {"align/digit_ratio": total.digit_ratio}
