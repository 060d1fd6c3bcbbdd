"""What an encoding of soft labels must offer, how its columns become bytes, and how one is found by name.

            teacher's worker                                        student's device
logits or hidden [n, .] --make--> columns --pack_rows--> bytes ~~~> unpack_rows --ready--> --pair--> PairedLogProbs
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from configs.labels import LABELS, Labels
from trainer.types import PairedLogProbs

if TYPE_CHECKING:
    from trainer.model.head import Head


ABSENT = -1e4
"""The log-probability of what has none: finite, because 0 * inf is NaN, and small enough that exp of it is 0."""


ALIGNED = "aligned"
"""Float32 [n, 1], a column beside those of an encoding where a teacher has another tokenizer: 0 for a row that no row
of the teacher belongs to, of which terms of labels make nothing."""


@dataclass(frozen=True, slots=True)
class Column:
    """One array of an encoding: `[N, width]` of a torch dtype.

    With `counts`, the name of a column of one number a row, the first so many entries of a row are meant and a block
    holds no others (`trainer/labels/ragged.py`); `encode` and `align` see rectangles all the same.
    """

    name: str
    dtype: torch.dtype
    width: int
    counts: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of one row, of a ragged one at most."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TeacherShape:
    """What the layout of an encoding may depend on."""

    vocabulary_size: int  # V, true
    hidden_size: int  # H
    dtype: torch.dtype  # of the hidden states


class Encoding(Protocol):
    """The contract of the class `Encoding` in each file, which derives from the encoding's parameters: of
    `configs/labels.py`, or in a file of a user's from `configs.labels.Labels`, with the fields it adds."""

    needs: Literal["logits", "hidden"]
    """What `encode` gets as `source`: logits `[n, V]` (sliced to the true vocabulary, soft-capped), or the final hidden
    states `[n, H]` (after the final norm, what lm_head reads)."""
    needs_row_keys: bool
    """Whether `encode` draws: it is then given `row_keys`, int64 [n], equal for the same row of the same text wherever
    and whenever it is scored (`row_keys` of this file)."""
    takes_ids: bool
    """Whether `encode` is given `given_ids`, int [n, num_given]: those that the request carries for each row, the first
    one always an id, then -1 from where a row has no more."""
    layers: tuple[int, ...]
    """Of encodings that have it (`hidden`): `encode` is then given `states` [n, K, H], those after these layers."""
    temperature: float
    least_vocabulary: int  # ids that a vocabulary needs for such labels to be made of it

    def layout(self, shape: TeacherShape) -> tuple[Column, ...]:
        """The columns in wire order. Wider dtypes first, so that every column stays aligned in a packed row."""
        ...

    def encode(self, source: torch.Tensor, target_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Columns for `n` rows. `target_ids` int64 [n] holds the token after each row. `source` is only read.

        One that draws has a third parameter, `row_keys` (see `needs_row_keys`), one that takes ids `given_ids`, one
        with `layers` `states`."""
        ...

    def prepare(self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None) -> Mapping[str, torch.Tensor]:
        """The labels of a chunk of rows after what wants many rows at once (the matrix product with the teacher's
        head); the labels themselves where there is no such thing. `align` takes both."""
        ...

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None
    ) -> PairedLogProbs:
        """Student logits float32 [n, V] and the labels of the same rows (columns, or what `prepare` made of them) as
        log-probabilities over one event set, at the encoding's temperature.

        `teacher_head` turns hidden states into teacher logits; None for encodings that need no head. Must not overwrite
        `logits` or `labels`.
        """
        ...

    def mass(self, columns: Mapping[str, np.ndarray]) -> float:
        """Mean probability mass that the kept events hold, for the report."""
        ...


def load_encoding(labels: Labels) -> Encoding:
    """The code of an encoding. Raises `ConfigError` where a class of a user's lacks a member."""
    return LABELS.load(labels)


def pack_rows(columns: Mapping[str, torch.Tensor], layout: tuple[Column, ...]) -> torch.Tensor:
    """uint8 [n, sum of column bytes]: one tensor per request leaves the engine, however many columns there are."""
    parts = []
    for column in layout:
        values = columns[column.name]
        assert (values.dtype, values.shape[1:]) == (column.dtype, (column.width,)), (column, values.dtype, values.shape)
        parts.append(values.contiguous().view(torch.uint8))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def unpack_rows(packed: np.ndarray, layout: tuple[Column, ...]) -> dict[str, np.ndarray]:
    """The inverse of `pack_rows` on uint8 [N, bytes], as contiguous numpy columns (bfloat16 as uint16 bits)."""
    columns, start = {}, 0
    for column in layout:
        raw = np.ascontiguousarray(packed[:, start : start + column.num_bytes])
        columns[column.name] = raw.view(numpy_dtype(column.dtype))
        start += column.num_bytes
    if start != packed.shape[1]:
        raise ValueError(f"packed rows hold {packed.shape[1]} bytes, the layout {layout} needs {start}")
    return columns


def row_keys(token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """int64 [n]: what random numbers of these rows of a text are drawn with, the same on every replica and device.

    `token_ids` int [L] are all tokens that are read, `rows` int64 [n]; both in host memory.
    """
    digest = hashlib.blake2b(token_ids.to(torch.int32).contiguous().numpy().tobytes(), digest_size=8).digest()
    return rows + int.from_bytes(digest, "little", signed=True) // 2


def target_logits(logits: torch.Tensor, target_ids: torch.Tensor, first_id: int) -> torch.Tensor:
    """float32 [n, 1] of a shard's logits [n, v], the columns from `first_id` on; -inf where another has the id."""
    places = target_ids[:, None] - first_id
    inside = (places >= 0) & (places < logits.shape[1])
    return logits.gather(1, places.clamp(0, logits.shape[1] - 1)).float().masked_fill(~inside, -torch.inf)


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """numpy has no bfloat16: its bits travel as uint16."""
    if dtype is torch.bfloat16:
        return np.dtype(np.uint16)
    return torch.empty(0, dtype=dtype).numpy().dtype
