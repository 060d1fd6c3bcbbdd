"""Alignment `chunks`: the shortest stretches of an answer that both tokenisations cut out, each one event.

The teacher's log-probabilities of the text's own tokens (`labels: token`) are summed over its tokens of a chunk, the
student's over its own (`chunk_kl`). Digits that one side reads one by one and the other in threes, which no shared
vocabulary covers, are chunks like all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.alignment import Chunks as Parameters
from trainer.align.rows import Chunks, Span, cut_chunks
from trainer.labels.encoding import Encoding

if TYPE_CHECKING:
    from trainer.align.aligner import SharedIds


class Aligner(Parameters):
    """See `trainer/align/aligner.py`."""

    def groups(self, student: tuple[Span, ...], teacher: tuple[Span, ...]) -> Chunks:
        return cut_chunks(student, teacher)

    def encoding(self, encoding: Encoding, shared: SharedIds) -> Encoding:
        """Itself: sums over chunks are no labels of rows."""
        return encoding
