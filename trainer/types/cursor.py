"""How far the data was read and trained, and what was met on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """Positions since the run began; read = good + rejected + dropped_too_long."""

    read: int = 0
    good: int = 0
    rejected: int = 0
    dropped_too_long: int = 0
    truncated: int = 0  # among the good ones

    def plus(self, change: StreamCounters) -> StreamCounters:
        return StreamCounters(
            read=self.read + change.read,
            good=self.good + change.good,
            rejected=self.rejected + change.rejected,
            dropped_too_long=self.dropped_too_long + change.dropped_too_long,
            truncated=self.truncated + change.truncated,
        )


@dataclass(frozen=True, slots=True)
class AnswerCounters:
    """Answers that a model wrote, and what was wrong with them."""

    written: int = 0
    empty: int = 0  # nothing but end tokens, or nothing at all
    cut_off: int = 0  # as long as allowed, and not ended by the model
    dropped: int = 0  # not trained on: empty ones, stale ones, and those cut off where `answers` leaves them out
    stale: int = 0  # written by older weights of the student than the run allows

    def plus(self, more: AnswerCounters) -> AnswerCounters:
        return AnswerCounters(
            written=self.written + more.written,
            empty=self.empty + more.empty,
            cut_off=self.cut_off + more.cut_off,
            dropped=self.dropped + more.dropped,
            stale=self.stale + more.stale,
        )

    @classmethod
    def sum(cls, counters: Iterable[AnswerCounters]) -> AnswerCounters:
        total = cls()
        for one in counters:
            total = total.plus(one)
        return total


@dataclass(frozen=True, slots=True)
class StreamPlace:
    """Where a block of a streamed dataset begins (`trainer/data/streamed.py`)."""

    position: int  # of its first row in the epoch
    file: int  # in the order of the epoch
    offset: int  # byte of a text file, row of a parquet file
    line: int  # of a text file, from 1


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the prompt stream has been *trained*: `position` prompts of epoch `epoch`, in the order of `seed`."""

    epoch: int
    position: int
    seed: int
    counters: StreamCounters = StreamCounters()  # what was met on the way there, over all attempts
    answers: AnswerCounters = AnswerCounters()  # likewise, of what was written for the prompts
    place: StreamPlace | None = None  # of a stream: where the block begins in which the position lies
    tasks: dict[str, Cursor] = field(default_factory=dict)  # of each, where there are several: the rest is their sum

    def with_answers(self, by_task: Mapping[str, AnswerCounters]) -> Cursor:
        """After further answers of these tasks, counted in the sum and in each task."""
        tasks = {
            name: replace(one, answers=one.answers.plus(by_task.get(name, AnswerCounters())))
            for name, one in self.tasks.items()
        }
        return replace(self, answers=self.answers.plus(AnswerCounters.sum(by_task.values())), tasks=tasks)
