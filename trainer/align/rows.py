"""Which rows of two tokenisations of the same text belong together: those before which the same bytes stand.

    student   |The| quick| 12|3|<end>        rows begin at bytes 0 3 9 12 13
    teacher   |The| qu|ick| |123|<end>       rows begin at bytes 0 3 6 9 10 13      together: 0 3 9 13

A row predicts the token that begins at its byte. Where a text differs between the two (a template strips white space,
an answer is cut), only rows before the first difference have partners: what comes later was read after another text.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.align.token_bytes import UNKNOWN, TokenBytes
from trainer.types import Coverage

END = b"\xfe"
"""Stands for the token that ends an answer, which has another name in each vocabulary. No byte of UTF-8."""


@dataclass(frozen=True, eq=False, slots=True)
class Span:
    """Neighbouring loss rows, such as those of one answer, as the text that they predict."""

    data: bytes
    starts: np.ndarray  # int64 [n]: the bytes before the token that each row predicts

    @property
    def content(self) -> int:
        """Bytes without the end."""
        return len(self.data) - self.data.endswith(END)


@dataclass(frozen=True, eq=False, slots=True)
class AlignedRows:
    """Rows that belong together, as positions among the loss rows of each side, both increasing."""

    student: np.ndarray  # int64 [m]
    teacher: np.ndarray  # int64 [m]


@dataclass(frozen=True, eq=False, slots=True)
class Chunks:
    """Stretches of both sides that stand for the same bytes, none of which can be cut further. Numbered from 0 in the
    order of the text; -1: in no chunk."""

    student: np.ndarray  # int64 [n], of each loss row
    teacher: np.ndarray  # int64 [n']
    count: int


def read_spans(
    token_ids: np.ndarray, loss_mask: np.ndarray, tokens: TokenBytes, *, ends: AbstractSet[int], whole: bool = False
) -> tuple[Span, ...]:
    """The spans of ids [L] with a mask bool [L] (shifted, as in `trainer/types.py`). A last token of `ends` is the
    end of the answer, whatever it is called. `whole`: the first span has the text before it, special tokens apart, as
    where a text is learnt from its first token on, which nothing predicts and each tokenizer cuts elsewhere."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss_mask.astype(np.int8), [0]]))).reshape(-1, 2)
    spans = []
    for first, stop in edges.tolist():
        ids = token_ids[first + 1 : stop + 1].tolist()
        starts = np.cumsum(tokens.lengths[[0, *ids[:-1]]])
        starts -= starts[0]
        last = END if ids[-1] in ends else tokens.values[ids[-1]]
        before = token_ids[: first + 1].tolist() if whole and not spans else []
        text = tokens.join(i for i in before if i not in tokens.special)
        spans.append(Span(text + tokens.join(ids[:-1]) + last, starts + len(text)))
    return tuple(spans)


def align_rows(student: tuple[Span, ...], teacher: tuple[Span, ...]) -> AlignedRows:
    """Span by span. Raises `ValueError` where there are not as many: whoever reads the rows refuses such."""
    mine, others, at, at_other = [], [], 0, 0
    for one, other in zip(student, teacher, strict=True):
        own, partners, _ = _common(one, other)
        mine.append(own + at)
        others.append(partners + at_other)
        at, at_other = at + len(one.starts), at_other + len(other.starts)
    return AlignedRows(np.concatenate(mine), np.concatenate(others))


def cut_chunks(student: tuple[Span, ...], teacher: tuple[Span, ...]) -> Chunks:
    """Between each two borders that both sides have. What comes after the last common border of a span is in none."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    count = 0
    for one, other in zip(student, teacher, strict=True):
        own, partners, closed = _common(one, other)
        num = len(own) - 1 + closed
        for side, span, first in ((sides[0], one, own), (sides[1], other, partners)):
            number = np.full(len(span.starts), -1, dtype=np.int64)
            stops = [*first[1:], len(span.starts)] if closed else first[1:]
            for chunk, (start, stop) in enumerate(zip(first, stops, strict=False)):
                number[start:stop] = count + chunk
            side.append(number)
        count += max(num, 0)
    return Chunks(np.concatenate(sides[0]), np.concatenate(sides[1]), count)


def coverage(spans: tuple[Span, ...], reached: np.ndarray) -> Coverage:
    """Of the student's spans; `reached` bool [n]: the loss rows whose token the labels say something of."""
    total, at = Coverage(), 0
    for span in spans:
        rows = reached[at : at + len(span.starts)]
        at += len(span.starts)
        text = np.frombuffer(span.data, dtype=np.uint8)[int(span.starts[0]) : span.content]
        widths = [stop - start for start, stop in pairwise([*span.starts.tolist(), len(span.data)])]
        of_bytes = np.repeat(rows, widths)[: len(text)]
        digit = (text >= ord("0")) & (text <= ord("9"))
        counts = (len(text), of_bytes.sum(), digit.sum(), (digit & of_bytes).sum())
        total = total.plus(Coverage(*map(int, counts)))
    return total


def _common(one: Span, other: Span) -> tuple[np.ndarray, np.ndarray, bool]:
    """Positions of the rows that begin at the same byte, of both sides, and whether both end at the same byte.

    A space before the first token, which sentencepiece adds, counts as not there where only one side has it.
    """
    mine, others = one.data, other.data
    spaces = [len(data) - len(data.lstrip(b" ")) for data in (mine, others)]
    skip, skip_other = (0, 0) if spaces[0] == spaces[1] else spaces
    shared = _common_prefix(mine[skip:], others[skip_other:])
    own, partners = one.starts - skip, other.starts - skip_other
    last = [np.append(keys[1:] != keys[:-1], True) & (keys >= 0) & (keys <= shared) for keys in (own, partners)]
    places = [np.flatnonzero(kept) for kept in last]
    _, a, b = np.intersect1d(own[places[0]], partners[places[1]], assume_unique=True, return_indices=True)
    closed = shared == len(mine) - skip == len(others) - skip_other and len(a) > 0
    return places[0][a], places[1][b], closed


def _common_prefix(one: bytes, other: bytes) -> int:
    """Bytes that are equal from the beginning on; what is unknown equals nothing."""
    length = min(len(one), len(other))
    first, second = (np.frombuffer(data, dtype=np.uint8, count=length) for data in (one, other))
    different = np.flatnonzero((first != second) | (first == UNKNOWN[0]))
    return int(different[0]) if len(different) else length
