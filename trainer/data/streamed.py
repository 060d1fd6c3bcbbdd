"""A stream as rows, block after block, for corpora that do not fit a disk.

    files, in another order in each epoch -> rows, read one after the other -> blocks -> their rows, shuffled

A block begins at a place of the stream and ends after `BLOCK_ROWS` rows or `BLOCK_BYTES` of text, so that the same
place always begins the same block. One block is in memory. A cursor holds the place where its block begins: whoever
continues reads that block again and nothing before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.paths import is_url
from trainer.errors import ConfigError, DataError, InfrastructureError, StillhouseError, reason_of
from trainer.types import Cursor, StreamPlace

if TYPE_CHECKING:
    from trainer.data.stream_files import StreamedRow, StreamFile

BLOCK_ROWS = 8192
BLOCK_BYTES = 64 * 2**20
PAUSES_S = (1.0, 5.0, 20.0)
"""Before each further attempt to go on reading a file that broke off."""

BEGINNING = StreamPlace(position=0, file=0, offset=0, line=1)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that stand one after the other in a stream."""

    begins: StreamPlace
    rows: Sequence[StreamedRow]
    follows: StreamPlace | None  # where the next one begins; None: the epoch ends

    @property
    def end(self) -> int:
        """The position after its last row."""
        return self.begins.position + len(self.rows)


class StreamedRows:
    """As `RawRows`, but only the rows of one block are there, by their positions in the stream. At first it is the
    first block in the order of the files, and its length is what `len` says."""

    def __init__(self, name: str, files: Sequence[StreamFile]) -> None:
        """Raises `ConfigError` or `DataError` where the first block cannot be read, or is empty."""
        self.name = name
        self._files = files
        self._order: Sequence[int] = range(len(files))
        self._coming: Iterator[tuple[StreamPlace, StreamedRow]] = iter(())
        self._next: tuple[StreamPlace, StreamedRow] | None = None
        self._begun = False
        self.block = self.load(BEGINNING)
        self._begun = True
        if not self.block.rows:
            raise DataError(f"the dataset {name} has no rows")
        self._num_first = len(self.block.rows)

    @property
    def num_files(self) -> int:
        return len(self._files)

    def __len__(self) -> int:
        return self._num_first

    def origin(self, row: int) -> str:
        return self._row(row).origin

    def raw(self, row: int) -> Mapping[str, Any]:
        return self._row(row).raw()

    def _row(self, position: int) -> StreamedRow:
        return self.block.rows[position - self.block.begins.position]

    def reorder(self, order: Sequence[int]) -> None:
        """The files in the order of this epoch."""
        self._order, self._next = order, None

    def load(self, begins: StreamPlace) -> Block:
        """Makes the block that begins there the present one: the one that follows without opening a file again."""
        if self._next is None or self._next[0] != begins:
            self._coming = self._rows_from(begins)
            self._next = next(self._coming, None)
        rows: list[StreamedRow] = []
        size = 0
        while self._next is not None and len(rows) < BLOCK_ROWS and size < BLOCK_BYTES:
            rows.append(self._next[1])
            size += rows[-1].size
            self._next = next(self._coming, None)
        self.block = Block(begins, rows, self._next[0] if self._next is not None else None)
        return self.block

    def _rows_from(self, place: StreamPlace) -> Iterator[tuple[StreamPlace, StreamedRow]]:
        """(its place, row) of all rows from there on."""
        position, offset, line = place.position, place.offset, place.line
        for number in range(place.file, len(self._order)):
            for row in self._of_file(self._files[self._order[number]], offset, line):
                yield StreamPlace(position, number, row.offset, row.line), row
                position += 1
            offset, line = BEGINNING.offset, BEGINNING.line

    def _of_file(self, file: StreamFile, offset: int, line: int) -> Iterator[StreamedRow]:
        """Goes on after the last row where a server breaks off. Raises `InfrastructureError` where that does not help,
        and `DataError` for a file that is damaged."""
        last: StreamedRow | None = None
        for pause in (*PAUSES_S, None):
            try:
                rows = file.rows_from(offset, line) if last is None else file.rows_from(last.offset, last.line)
                if last is not None:
                    next(rows, None)
                for row in rows:
                    yield row
                    last = row
                return
            except Exception as error:
                if isinstance(error, DataError) or (isinstance(error, StillhouseError) and not self._begun):
                    raise
                if not is_url(file.path):
                    raise DataError(f"cannot read the dataset {file.path}: {reason_of(error)}") from error
                if pause is None:
                    raise InfrastructureError(
                        f"the stream {file.path} broke off {len(PAUSES_S) + 1} times: {reason_of(error)}; the same "
                        "command goes on from the last checkpoint"
                    ) from error
                time.sleep(pause)


class StreamOrder:
    """Which row stands at a position: the rows of each block shuffled, the files too. Their number is not known."""

    num_rows = None

    def __init__(self, rows: StreamedRows, *, seed: int, shuffle: bool) -> None:
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._shuffled = np.arange(0)

    def row(self, epoch: int, position: int) -> int | None:
        """None where the epoch has no such position: it is over."""
        if epoch != self._epoch:
            self._begin(epoch, BEGINNING)
        while position >= self._rows.block.end:
            if self._rows.block.follows is None:
                return None
            self._load(self._rows.block.follows)
        start = self._rows.block.begins.position
        return start + int(self._shuffled[position - start])

    @property
    def place(self) -> StreamPlace | None:
        """Where the present block begins."""
        return self._rows.block.begins if self._epoch >= 0 else None

    def seek(self, cursor: Cursor) -> None:
        """Raises `ConfigError` for a cursor of a run that did not stream."""
        if cursor.place is not None:
            self._begin(cursor.epoch, cursor.place)
        elif cursor.position:
            raise ConfigError(f"the checkpoint does not say where its rows stand in the stream {self._rows.name}")

    def _begin(self, epoch: int, place: StreamPlace) -> None:
        generator, num = np.random.default_rng((self._seed, epoch)), self._rows.num_files
        self._rows.reorder(generator.permutation(num) if self._shuffle else range(num))
        self._epoch = epoch
        self._load(place)

    def _load(self, place: StreamPlace) -> None:
        block = self._rows.load(place)
        generator = np.random.default_rng((self._seed, self._epoch, place.position))
        num = len(block.rows)
        self._shuffled = generator.permutation(num) if self._shuffle else np.arange(num)
