"""Which row stands at which position of an epoch: rows by number in a seeded permutation, or those of a stream."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from trainer.errors import ConfigError
from trainer.types import Cursor, StreamPlace


class Order(Protocol):
    """Fixed by the seed, in every epoch another."""

    @property
    def num_rows(self) -> int | None:
        """Of an epoch; None where it is not known before its end."""
        ...

    def row(self, epoch: int, position: int) -> int | None:
        """None where the epoch has no such position: it is over."""
        ...

    @property
    def place(self) -> StreamPlace | None:
        """What a cursor must hold beside the position, to be continued from."""
        ...

    def seek(self, cursor: Cursor) -> None:
        """Raises `ConfigError` for a cursor that cannot be continued from."""
        ...


class Permuted:
    """All rows by number."""

    place = None

    def __init__(self, name: str, num_rows: int, *, seed: int, shuffle: bool) -> None:
        self._name = name
        self.num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._rows = np.arange(num_rows)

    def row(self, epoch: int, position: int) -> int | None:
        if position == self.num_rows:
            return None
        if self._shuffle and epoch != self._epoch:
            self._epoch, self._rows = epoch, np.random.default_rng((self._seed, epoch)).permutation(self.num_rows)
        return int(self._rows[position])

    def seek(self, cursor: Cursor) -> None:
        if not 0 <= cursor.position <= self.num_rows:
            raise ConfigError(
                f"the checkpoint stands at row position {cursor.position}, but the dataset {self._name} has "
                f"{self.num_rows} rows: it has changed since the run began"
            )
