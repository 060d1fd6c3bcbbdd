"""How much of the answers the labels of a teacher with another tokenizer reach, in numbers and as a limit."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence

from trainer.errors import DataError
from trainer.types import Coverage, Reading, Sequence

TaskAndTeacher = tuple[str, str]
"""The name of the teacher is empty where a task asks one."""

LEAST_BYTES = 1000
"""Of answers, before their share is judged: one unlucky row is no rule."""


class AlignedShare:
    """Of each teacher of each task with `align`, since the run began or went on."""

    def __init__(self, min_ratio: Mapping[str, float]) -> None:
        """By task."""
        self._min_ratio = min_ratio
        self._found: dict[TaskAndTeacher, Coverage] = {}

    def add(self, sequences: AbstractSequence[Sequence], *, least_bytes: int = LEAST_BYTES) -> None:
        """Raises `DataError` where a task has at least so many bytes, and too few of them are aligned."""
        for one, more in covered(sequences).items():
            self._found[one] = self._found.get(one, Coverage()).plus(more)
        for (task, teacher), found in self._found.items():
            wanted = self._min_ratio.get(task, 0.0)
            if found.num_bytes >= least_bytes and found.byte_ratio < wanted:
                whose = f"the tokens of teacher {teacher}" if teacher else "the teacher's tokens"
                raise DataError(
                    f"only {described(found)} of the answers of task {task} are aligned with {whose}, and "
                    f"align.min_ratio is {wanted:g}: the vocabularies have too little in common for this method, or "
                    "the chat templates render answers differently; write align: chunks (with labels: token), or a "
                    "lower min_ratio if you accept that the rest is not learnt from the teacher"
                )

    @property
    def found(self) -> Mapping[TaskAndTeacher, Coverage]:
        return self._found


def covered(sequences: AbstractSequence[Sequence]) -> dict[TaskAndTeacher, Coverage]:
    """Of the sequences that are aligned."""
    found: dict[TaskAndTeacher, Coverage] = {}
    for sequence in sequences:
        for teacher, reading in _readings(sequence).items():
            one = sequence.task, teacher
            found[one] = found.get(one, Coverage()).plus(reading.coverage)
    return found


def _readings(sequence: Sequence) -> Mapping[str, Reading]:
    return sequence.readings or ({} if sequence.reading is None else {"": sequence.reading})


def described(coverage: Coverage) -> str:
    """`81.2% of the bytes and 33.0% of the digits`."""
    digits = coverage.digit_ratio
    return f"{coverage.byte_ratio:.1%} of the bytes" + ("" if digits is None else f" and {digits:.1%} of the digits")


def align_metrics(sequences: AbstractSequence[Sequence]) -> dict[str, float]:
    """Of the aligned sequences of a step, all tasks and teachers together."""
    total = Coverage()
    for one in covered(sequences).values():
        total = total.plus(one)
    readings = [reading for sequence in sequences for reading in _readings(sequence).values()]
    if not readings:
        return {}
    rows, reached = sum(len(one.groups) for one in readings), sum(int((one.groups >= 0).sum()) for one in readings)
    metrics = {"align/byte_ratio": total.byte_ratio, "align/row_ratio": reached / rows}
    return metrics if total.digit_ratio is None else metrics | {"align/digit_ratio": total.digit_ratio}
