"""What a teacher is asked about, and the labels that it gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from configs.section import TOGETHER

if TYPE_CHECKING:
    import torch

    from configs.labels import Labels
    from trainer.types.texts import Sequence


BlockRef = object
"""Where a block lies: the block itself in one process, an object reference on a cluster. Opaque to the loops."""


RowIdsRef = object
"""Where the ids that a unit's teacher is asked about lie, likewise."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The sequences that one replica scores together and one rank trains in one step. Scoring it is a pure function."""

    id: str  # from stream positions, so equal at every world size that cuts the step equally
    sequences: tuple[Sequence, ...]
    is_test: bool = False  # of a self-test: its labels come from the engine, never from a store

    @property
    def kind(self) -> tuple[str, str]:
        """Task and teacher of all its sequences."""
        return self.sequences[0].kind

    def as_read(self) -> Unit:
        """As its teacher reads it (`Sequence.as_read`)."""
        if all(sequence.reading is None for sequence in self.sequences):
            return self
        return Unit(self.id, tuple(sequence.as_read() for sequence in self.sequences))

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.sequences)

    @property
    def num_rows(self) -> int:
        return sum(s.num_loss_tokens for s in self.sequences)

    def asked(self) -> tuple[Unit, ...]:
        """What each teacher scores, in their order: the unit itself, or where several are asked one unit for each."""
        names = self.kind[1].split(TOGETHER)
        return (self,) if len(names) == 1 else tuple(self.of_teacher(name, f"{self.id}@{name}") for name in names)

    def of_teacher(self, name: str, unit_id: str) -> Unit:
        """The same sequences, scored by others."""
        return Unit(unit_id, tuple(sequence.of_teacher(name) for sequence in self.sequences))

    def tokens_hash(self) -> str:
        """Identifies the exact tokens and rows a block was made for."""
        return hash_tokens(self.sequences)


@dataclass(frozen=True, slots=True)
class RowIds:
    """Ids that somebody chose for each loss row of a unit, on which a teacher is then asked for log-probabilities."""

    tokens_hash: str  # of the unit
    ids: np.ndarray  # int32 [N, K]: different ids of a row, at least one, then -1 from where it has no more

    def of_sequences(self, unit: Unit) -> list[np.ndarray]:
        """int32 [n, K] of each sequence that has loss rows."""
        borders = np.cumsum([s.num_loss_tokens for s in unit.sequences if s.num_loss_tokens])
        return np.split(self.ids, borders[:-1])


def hash_tokens(sequences: AbstractSequence[Sequence]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for sequence in sequences:
        digest.update(np.int64(sequence.num_tokens).tobytes())
        digest.update(np.ascontiguousarray(sequence.token_ids, dtype=np.int32).tobytes())
        digest.update(np.packbits(sequence.loss_mask).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class LabelHeader:
    """What a block's numbers mean. Blocks of one task and teacher have equal headers but for `weights_version`: a
    teacher may move while the student learns."""

    teacher: str
    weights_version: str
    encoding: Labels  # its parameters
    tokenizer_fingerprint: str
    vocabulary_size: int  # V
    hidden_size: int  # H, of what the teacher's head reads
    dtype: str  # of the teacher's hidden states, a name of torch


@dataclass(frozen=True, slots=True)
class SoftLabelBlock:
    """The labels of one unit as flat arrays; rows in sequence order, inside a sequence in token order.

    The same bytes in memory, on the wire and on disk.
    """

    header: LabelHeader
    tokens_hash: str
    columns: Mapping[str, np.ndarray]  # each [N, width], a ragged one flat [R]; bfloat16 travels as uint16 bits
    row_offsets: np.ndarray  # int64 [S + 1]: sequence s owns rows row_offsets[s] : row_offsets[s + 1]

    @property
    def num_rows(self) -> int:
        return int(self.row_offsets[-1])

    @property
    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())


@dataclass(frozen=True, slots=True)
class StoreUse:
    """What the label store gave to a unit: sequences with labels that it held, and that it did not."""

    hits: int
    misses: int
    num_bytes: int  # of labels, read
    keeps: bool = True  # whether those that it did not hold are kept: it may be full, or only read


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What the controller reads of a scored unit; the block itself never passes through it."""

    unit_id: str
    tokens_hash: str
    replica: str
    num_rows: int
    num_tokens: int
    num_bytes: int
    num_non_finite: int
    mean_mass: float  # mean probability mass the encoding kept (1.0 for dense and hidden labels)
    score_s: float  # from the first request of the unit entering the engine to its last row leaving it
    started_s: float  # wall clock (time.time) of the first request, for the timeline
    mean_entropy: float | None = None  # of the labels, nats per row; None: the encoding does not tell
    store: StoreUse | None = None  # None: there is none, or it was not asked
    notes: tuple[str, ...] = ()  # what a person should know


@dataclass(frozen=True, slots=True)
class PairedLogProbs:
    """Log-probabilities of student and teacher over one shared set of events; each row sums to one in both.

    `exhaustive` is True where the events are the whole vocabulary; where False the last event is the lumped tail,
    and every divergence is then a lower bound of the one over the vocabulary (data processing inequality).
    """

    student: torch.Tensor  # float32 [N, E], carries the gradient
    teacher: torch.Tensor  # float32 [N, E]
    exhaustive: bool
    student_scores: torch.Tensor | None = None  # float32 [N, E], what `student` is the log-softmax of
    ids: torch.Tensor | None = None  # int64 [N, E - 1] of the events before the tail; None: no tail, event e is id e
    teacher_entropy: torch.Tensor | None = None  # float32 [N], in nats, where `teacher` is an estimate that has another
    teacher_target: torch.Tensor | None = None  # float32 [N], of the target id, where that may lie in the tail
