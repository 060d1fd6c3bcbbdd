"""The texts of a row as teacher and student read them, aligned: what a teacher is asked, and whose rows its labels are.

row --> student's template --> ids, loss rows  --+
    --> teacher's template --> ids, loss rows  --+--> Reading: the teacher's ids, the rows asked for, groups of both
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from configs.alignment import ALIGNMENTS, Alignment, Overlap
from trainer.align.aligner import Aligner
from trainer.align.rows import Span, coverage, read_spans
from trainer.align.token_bytes import TokenBytes
from trainer.align.vocabularies import ABSENT_ID
from trainer.data.chat import Template
from trainer.errors import DataError
from trainer.types import Completion, Reading, RowText

_SHOWN = 40


@dataclass(frozen=True, eq=False)
class Side:
    """How one of both models reads text."""

    template: Template
    tokens: TokenBytes
    ends: frozenset[int]  # ids that end an answer

    @classmethod
    def of(cls, template: Template, end_ids: Iterable[int], *, name: str) -> Side:
        """`end_ids` by the model's generation settings; `name` of the tokenizer, for messages. Raises `ConfigError` for
        one whose tokens are no bytes of the text."""
        tokens = TokenBytes.of(template.tokenizer, name=name)
        ends = {i for i in (*template.stop_ids, *end_ids) if i < len(tokens.values)}
        return cls(template, tokens, frozenset(ends))

    def spans(self, text: RowText, *, whole: bool) -> tuple[Span, ...]:
        """See `read_spans`."""
        assert text.loss_mask is not None
        return read_spans(text.token_ids, text.loss_mask, self.tokens, ends=self.ends, whole=whole)


@dataclass(frozen=True, eq=False)
class TextAligner:
    """The alignment of one task."""

    method: Aligner
    parameters: Alignment
    student: Side
    teacher: Side
    table: np.ndarray  # int32 [V of the teacher], as `match_ids` makes it
    roles: Mapping[int, int]  # ids of the student by ids of the teacher, of tokens that end an answer
    max_length: int  # of the student's texts

    def for_evaluation(self) -> TextAligner:
        """Held-out rows are compared over shared ids, whatever the method of the training."""
        parameters = Overlap(min_ratio=self.parameters.min_ratio)
        return replace(self, method=ALIGNMENTS.load(parameters), parameters=parameters)

    def reading(self, student: RowText, teacher: RowText, *, cut: bool = False) -> Reading:
        """What the teacher reads in the place of the student's text. `cut`: one of them was shortened at its end.

        Raises `DataError` where they are not the same answers, or where no row of them belongs together.
        """
        assert student.loss_mask is not None
        assert teacher.loss_mask is not None
        whole = bool(student.loss_mask[0] or teacher.loss_mask[0])
        sides = self.student.spans(student, whole=whole), self.teacher.spans(teacher, whole=whole)
        if len(sides[0]) != len(sides[1]) and not cut:
            raise DataError(
                f"has {len(sides[0])} learnt turns by the student's chat template and {len(sides[1])} by the "
                "teacher's, which cannot be aligned: write loss_on: last"
            )
        num = min(map(len, sides))
        found = self.method.groups(sides[0][:num], sides[1][:num]) if num else None
        if found is None or not found.count:
            shown = " and ".join(_shown(side) for side in sides)
            raise DataError(f"no token of its answer can be aligned: student and teacher read {shown}")
        rows, asked_rows = np.flatnonzero(student.loss_mask), np.flatnonzero(teacher.loss_mask)
        groups = np.full(len(rows), -1, dtype=np.int64)
        groups[: len(found.student)] = found.student
        asked = found.teacher >= 0
        mask = np.zeros_like(teacher.loss_mask)
        mask[asked_rows[: len(asked)][asked]] = True
        reached = groups >= 0
        if self.parameters.compares_ids:
            reached &= self._shared[student.token_ids[rows + 1]]
        return Reading(
            token_ids=teacher.token_ids,
            loss_mask=mask,
            groups=groups,
            teacher_groups=found.teacher[asked],
            num_groups=found.count,
            coverage=coverage(sides[0], reached),
            chunked=self.parameters.chunked,
        )

    def answered(self, prompt: RowText, reading: Reading, completion: Completion) -> RowText:
        """What a teacher wrote to its own prompt, as the student's text, and as the teacher reads it again. Raises
        `DataError` where nothing of it can be aligned."""
        inside = completion.token_ids < len(self.teacher.tokens.values)
        known = completion.token_ids if inside.all() else completion.token_ids[: int(np.argmin(inside))]
        read = _answered(reading.token_ids, known)
        text = _answered(prompt.token_ids, np.asarray(self.translated(known), dtype=np.int32))
        if cut := len(text.token_ids) > self.max_length:
            mask = text.loss_mask[: self.max_length].copy()
            mask[-1] = False
            text = RowText(text.token_ids[: self.max_length], mask)
        return replace(text, reading=self.reading(text, read, cut=cut))

    def translated(self, token_ids: np.ndarray) -> list[int]:
        """The student's ids of a text that the teacher wrote: of the same bytes, as far as they are UTF-8, and with the
        student's own end where the teacher ended it and nothing was left out."""
        ids = token_ids.tolist()
        end = ids.pop() if ids and ids[-1] in self.teacher.ends else None
        found: list[int] = []
        for special, run in groupby(ids, key=lambda i: i in self.teacher.tokens.special and self.table[i] != ABSENT_ID):
            if special:
                found += [int(self.table[i]) for i in run]
                continue
            data = self.teacher.tokens.join(run)
            text = _readable(data)
            found += self.student.template.plain_ids(text)
            if text.encode() != data:
                return found
        return found if end is None else [*found, self.roles.get(end, next(iter(self.roles.values())))]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was matched, for people."""
        names = [side.template.tokenizer.convert_ids_to_tokens for side in (self.teacher, self.student)]
        ends = ", ".join(f"{names[0](a)} is {names[1](b)}" for a, b in self.roles.items())
        num_shared, num = int((self.table != ABSENT_ID).sum()), len(self.student.tokens.values)
        return (
            f"{num_shared} of the student's {num} and the teacher's {len(self.table)} tokens are the same bytes",
            f"tokens that end an answer: {ends}",
        )

    @property
    def _shared(self) -> np.ndarray:
        """bool [V of the student]: ids that the teacher has too."""
        shared = np.zeros(len(self.student.tokens.values), dtype=bool)
        shared[self.table[self.table != ABSENT_ID]] = True
        return shared


def _shown(spans: tuple[Span, ...]) -> str:
    return repr(spans[0].data[:_SHOWN].decode(errors="replace")) if spans else "nothing"


def _answered(prompt: np.ndarray, answer: np.ndarray) -> RowText:
    """Prompt and answer; the first answer token is predicted by the last row of the prompt."""
    token_ids = np.concatenate([prompt, answer]).astype(np.int32)
    mask = np.zeros(len(token_ids), dtype=bool)
    mask[len(prompt) - 1 : -1] = len(answer) > 0
    return RowText(token_ids, mask)


def _readable(data: bytes) -> str:
    """As far as it is UTF-8: an answer may be cut off inside a character."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()
