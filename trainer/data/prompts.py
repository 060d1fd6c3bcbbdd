"""The stream of prompts: seeded positions over the rows of a dataset, epoch after epoch, and a cursor to continue from.

    position -> row of this epoch's permutation -> read, validate -> render, tokenise -> length rule -> Prompt
                                                        |                  |               |
                                                        +--- bad row: error, or rejected.jsonl and counted

Rows are tokenised each time they are read: that costs microseconds a token, a cache would cost memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import BadRow, ConfigError, DataError, InfrastructureError, TooLong
from trainer.records import append_lines, read_lines
from trainer.types import Cursor, Prompt, StreamCounters

if TYPE_CHECKING:
    from trainer.data.prompt_reader import PromptReader


MOST_UNUSABLE = 8192
"""Rows of a stream that may be left out one after the other before the run ends."""


@dataclass(frozen=True, slots=True)
class Remarked:
    """Ok rows of which something is to be told."""

    num: int = 0
    first: str = ""  # "file:line: field: text"; empty where there is none

    def and_in(self, found: str | None) -> Remarked:
        """With another row, where something was found in it."""
        return self if found is None else Remarked(self.num + 1, self.first or found)


@dataclass(frozen=True, slots=True)
class RowReport:
    """num_checked = num_ok + num_dropped + len(bad_rows)."""

    num_rows: int  # of a stream: those of its first block
    num_checked: int
    num_ok: int  # truncated ones included
    bad_rows: tuple[BadRow, ...]
    num_dropped: int  # too long, with data.on_too_long: drop or truncate
    num_truncated: int
    min_tokens: int  # of the sequences of the ok rows, as they would be trained; 0 where there is none
    median_tokens: int
    max_tokens: int
    num_loss_tokens: int  # of the ok rows that have answers
    num_answered: int  # ok rows that have answers; to the others one is written
    num_split: int  # ok rows of several sequences: conversations whose earlier turns the template rewrites
    num_of_split: int  # sequences that they became
    max_compared_tokens: int  # of all answers to one prompt, where they are compared; 0 where none are
    special: Remarked  # special tokens in their text
    media: Remarked  # marks in their text that stand for pictures, sound or films

    @property
    def problems(self) -> tuple[str, ...]:
        """Of each bad row "file:line: field: what is wrong"."""
        return tuple(map(str, self.bad_rows))


class Quarantine:
    """The file that lists the rows left out, each once, also over resumed runs."""

    def __init__(self, path: Path) -> None:
        self.notes: list[str] = []
        """About lines that cannot be read; their rows may be listed again."""
        self._path = path
        if path.exists():
            append_lines(path).close()
        self._listed = set(read_lines(path, _origin, tell=self.notes.append))

    def list(self, problem: BadRow) -> None:
        if problem.origin in self._listed:
            return
        self._listed.add(problem.origin)
        entry = {"origin": problem.origin, "reason": problem.reason, "row": problem.preview}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _origin(record: Mapping[str, Any]) -> str:
    origin = record.get("origin")
    if not isinstance(origin, str):
        raise ValueError("origin: must be text")
    return origin


class PromptStream:
    """Prompts at fixed positions: position p of epoch e is always the same row, whichever rows before it were left out.

    A rejected or dropped row leaves its position empty; nothing is refilled, so a step is a fixed set of positions.
    """

    def __init__(
        self, reader: PromptReader, *, seed: int, quarantine: Path | None = None, num_epochs: int | None = None
    ) -> None:
        """Begins at the first position, and ends after `num_epochs`, or never. `quarantine` is the file that lists
        rejected and dropped rows, each once, also over resumed runs."""
        self._reader = reader
        self._num_epochs = num_epochs
        self._cursor = Cursor(epoch=0, position=0, seed=seed)
        self._order = reader.rows.order(seed=seed, shuffle=reader.data.shuffle)
        self._unusable_in_a_row = 0
        self._first_problem = ""
        self._quarantine = None if quarantine is None else Quarantine(quarantine)

    @property
    def notes(self) -> tuple[str, ...]:
        """User-facing messages about records of an earlier attempt that cannot be read."""
        return () if self._quarantine is None else tuple(self._quarantine.notes)

    def row_of(self, prompt: Prompt) -> Mapping[str, Any]:
        """The dataset's row that a prompt of this stream was made of, as it stands there; not of a streamed dataset."""
        return self._reader.rows.raw.raw(int(prompt.id.rpartition(":")[2]))

    @property
    def rows_per_epoch(self) -> int | None:
        """Positions of an epoch: all rows, usable or not. None for a stream, whose end is not known before."""
        return self._order.num_rows

    @property
    def counters(self) -> StreamCounters:
        return self._cursor.counters

    @property
    def cursor(self) -> Cursor:
        """The next position."""
        return self._cursor

    def seek(self, cursor: Cursor) -> None:
        """Continue exactly at a cursor. Raises `ConfigError` for one of another seed or beyond the rows there are."""
        if cursor.seed != self._cursor.seed:
            raise ConfigError(
                f"the checkpoint's data order has seed {cursor.seed}, this run has seed {self._cursor.seed}: "
                "a run continues only with its own seed"
            )
        self._order.seek(cursor)
        self._cursor = cursor
        self._unusable_in_a_row = 0

    def take(self, num: int) -> list[Prompt]:
        """The prompts at the next `num` positions, in order, over epoch borders; shorter where rows are left out, and
        where the last epoch ends.

        Raises `DataError` at a row that the configuration does not allow to be left out, and where a whole epoch gave
        nothing.
        """
        prompts = []
        for _ in range(num):
            if self._is_over():
                break
            prompt = self._next()
            if prompt is not None:
                prompts.append(prompt)
        return prompts

    def _is_over(self) -> bool:
        num_rows = self.rows_per_epoch
        if self._num_epochs is None or num_rows is None:
            return False
        return self._cursor.epoch * num_rows + self._cursor.position >= self._num_epochs * num_rows

    def _next(self) -> Prompt | None:
        epoch, position = self._cursor.epoch, self._cursor.position
        row = self._order.row(epoch, position)
        if row is None:
            epoch, position = epoch + 1, 0
            row = self._order.row(epoch, position)
            if row is None:
                raise InfrastructureError(f"the dataset {self._reader.rows.raw.name} has no rows any more")
        if position == 0 and self.rows_per_epoch is not None:
            self._unusable_in_a_row = 0
        prompt, change = self._read(row, f"{epoch}:{row}")
        counters = self._cursor.counters.plus(change)
        place = self._order.place
        self._cursor = replace(self._cursor, epoch=epoch, position=position + 1, counters=counters, place=place)
        return prompt

    def _read(self, row: int, prompt_id: str) -> tuple[Prompt | None, StreamCounters]:
        try:
            prompt, truncated = self._reader.read(row, prompt_id)
        except TooLong as problem:
            if self._reader.data.on_too_long == "error":
                raise
            self._leave_out(problem)
            return None, StreamCounters(read=1, dropped_too_long=1)
        except BadRow as problem:
            if self._reader.data.on_bad_row == "error":
                raise
            self._leave_out(problem)
            return None, StreamCounters(read=1, rejected=1)
        self._unusable_in_a_row = 0
        return prompt, StreamCounters(read=1, good=1, truncated=int(truncated))

    def _leave_out(self, problem: BadRow) -> None:
        if not self._unusable_in_a_row:
            self._first_problem = str(problem)
        self._unusable_in_a_row += 1
        if self._quarantine is not None:
            self._quarantine.list(problem)
        most = self.rows_per_epoch or MOST_UNUSABLE
        if self._unusable_in_a_row >= most:
            raise DataError(
                f"0 of {most} rows of the dataset {self._reader.rows.raw.name} are usable; "
                f"for example {self._first_problem}"
            )


def _compared_tokens(prompt: Prompt) -> int:
    answers = (prompt, *prompt.alternatives) if prompt.alternatives else ()
    return sum(len(answer.token_ids) for answer in answers)


def check_rows(reader: PromptReader, *, budget: int) -> RowReport:
    """Reads up to `budget` rows exactly as training would: all of them, or evenly spread ones of a larger dataset.

    Raises `ConfigError` for a chat template that cannot be used.
    """
    num_rows = len(reader.rows)
    chosen = np.arange(num_rows) if num_rows <= budget else np.linspace(0, num_rows - 1, budget).astype(int)
    prompts, problems, num_dropped, num_truncated = [], [], 0, 0
    special = media = Remarked()
    for row in chosen:
        try:
            prompt, truncated = reader.read(int(row), f"0:{row}")
        except BadRow as problem:
            if isinstance(problem, TooLong) and reader.data.on_too_long != "error":
                num_dropped += 1
            else:
                problems.append(problem)
            continue
        prompts.append(prompt)
        num_truncated += truncated
        token, mark = reader.remarks(int(row))
        special, media = special.and_in(token), media.and_in(mark)
    lengths = [len(text.token_ids) for prompt in prompts for text in (prompt, *prompt.turns)]
    masks = [text.loss_mask for prompt in prompts for text in (prompt, *prompt.turns) if text.loss_mask is not None]
    split = [prompt for prompt in prompts if prompt.turns]
    return RowReport(
        num_rows=num_rows,
        num_checked=len(chosen),
        num_ok=len(prompts),
        bad_rows=tuple(problems),
        num_dropped=num_dropped,
        num_truncated=num_truncated,
        min_tokens=min(lengths, default=0),
        median_tokens=int(np.median(lengths)) if lengths else 0,
        max_tokens=max(lengths, default=0),
        num_loss_tokens=sum(int(mask.sum()) for mask in masks),
        num_answered=sum(prompt.loss_mask is not None for prompt in prompts),
        num_split=len(split),
        num_of_split=sum(1 + len(prompt.turns) for prompt in split),
        max_compared_tokens=max(map(_compared_tokens, prompts), default=0),
        special=special,
        media=media,
    )
