"""One row as one prompt: read, rendered, tokenised, and measured against the length limit.

Training (`trainer/data/prompts.py`) and `check` read rows through the same reader.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from configs.prompts import Data, Dataset
from configs.section import MAIN
from configs.tasks import Ensemble, Route
from trainer.data.chat import Template, TooManyTokens
from trainer.data.dataset_options import learnt_turns, refuse_without_turns, with_system_prompt
from trainer.data.media import media_mark_in
from trainer.data.row import CandidatesRow, ChatRow, CorpusRow, PreferenceRow, Row, preview, texts_of
from trainer.data.rows import Rows
from trainer.data.teacher_weights import weights_of
from trainer.data.vocabulary import SharedVocabulary
from trainer.errors import BadRow, ConfigError, DataError, TooLong
from trainer.types import Prompt, Reading, RowText

if TYPE_CHECKING:
    from trainer.align.texts import TextAligner

MAX_CHARACTERS = 256
"""For each token that is allowed. No text has tokens of that length on average: a row of more is too long, and need not
be tokenised to know it, which takes seconds and gigabytes for the longest lines."""

_FORMATS = {PreferenceRow: "preference", CandidatesRow: "candidates"}
_FOUND = {
    "preference": "is a pair of a chosen and a rejected answer, and no term of the objective compares such; write "
    "loss: dpo, or the answer to learn as completion",
    "candidates": "has several answers, and no term of the objective compares such; write loss: listwise_kl, or the "
    "answer to learn as completion",
}
_WANTED = {
    "preference": "is no pair of answers, and the objective compares them; a preference has prompt, chosen and "
    "rejected",
    "candidates": "has no candidates, and the objective compares them; such rows have prompt and candidates",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """The task that rows are read for, the teacher that is asked about them, and whether they must be preferences."""

    task: str = MAIN
    teacher: str = ""
    route: Route | None = None  # instead of `teacher`: by a column of the row
    ensemble: Ensemble | None = None  # of `teacher`, where it names several
    compared: str = ""  # the format that every row has, where answers are compared; else no row has such a one
    scored: bool = False  # every row has a score of each candidate
    best: bool = False  # of answers to compare the best one is read, as if it were the only one


@dataclass(frozen=True, slots=True)
class ToWrite:
    """Answers that are written while the run trains: rows without one are prompts, without a loss mask."""

    room: int = 0  # tokens that an answer may take: a prompt is so much shorter than `data.max_length`
    rewrite: bool = False  # rows that have an answer get another one, too


@dataclass(frozen=True)
class PromptReader:
    """Random access to the rows of one dataset as prompts, for `PromptStream` and `check_rows`."""

    rows: Rows
    data: Data
    template: Template
    vocabulary_size: int
    to_write: ToWrite | None  # None: every row needs its answer
    asks: Asked
    dataset: Dataset
    aligners: Mapping[str, TextAligner] = field(default_factory=dict)
    """By teacher, of those that read rows by tokenizers of their own."""

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        *,
        data: Data,
        template: Template,
        vocabulary: SharedVocabulary,
        to_write: ToWrite | None = None,
        asks: Asked | None = None,
        aligners: Mapping[str, TextAligner] = MappingProxyType({}),
    ) -> PromptReader:
        """Raises `ConfigError` or `DataError` where the dataset as a whole cannot give what is asked."""
        rows = Rows.open(dataset)
        if to_write is not None and to_write.room >= data.max_length:
            raise ConfigError(
                f"an answer of up to {to_write.room} tokens leaves no room for a prompt in data.max_length "
                f"{data.max_length}: raise data.max_length or lower answers.max_new_tokens"
            )
        return cls(rows, data, template, vocabulary.size, to_write, asks or Asked(), dataset, aligners)

    @property
    def _rewrites(self) -> bool:
        return self.to_write is not None and self.to_write.rewrite

    def read(self, row: int, prompt_id: str) -> tuple[Prompt, bool]:
        """The prompt of a row, and whether it was truncated. Raises `TooLong` or `BadRow`; `ConfigError` for a template
        or an option that fits no row."""
        origin = self.rows.raw.origin(row)
        parsed = self.rows.read(row, needs_answer=self.to_write is None)
        if isinstance(parsed, PreferenceRow | CandidatesRow) and self.asks.best:
            parsed = parsed.best
        num_characters = sum(len(text) for _, text in texts_of(parsed))
        if num_characters > MAX_CHARACTERS * self.data.max_length and self.data.on_too_long != "truncate":
            raise self._too_long(origin, f"{num_characters} characters")
        self._check_compared(row, parsed, origin)
        several = isinstance(parsed, PreferenceRow | CandidatesRow)
        answers = parsed.answers if several else (parsed,)
        ((first, *turns), truncated), *others = [self._read_aligned(row, one, origin) for one in answers]
        prompt = Prompt(
            prompt_id,
            token_ids=first.token_ids,
            loss_mask=first.loss_mask,
            row_weights=first.row_weights,
            origin=origin,
            task=self.asks.task,
            teacher=self._teacher(row, origin),
            teacher_weights=self._teacher_weights(row, origin),
            alternatives=tuple(text for texts, _ in others for text in texts),
            turns=tuple(turns),
            scores=parsed.scores if isinstance(parsed, CandidatesRow) else None,
            weight=1.0 if several else parsed.weight,
            reading=first.reading,
            readings=first.readings,
        )
        return prompt, truncated or any(cut for _, cut in others)

    def _check_compared(self, row: int, parsed: Row, origin: str) -> None:
        """Raises `BadRow` where the objective compares other answers than the row has."""
        found, wanted = _FORMATS.get(type(parsed), ""), self.asks.compared
        problem = None
        if found != wanted:
            problem = _WANTED[wanted] if wanted else _FOUND[found]
        elif self.asks.scored and parsed.scores is None:
            problem = "scores: are missing, and the objective learns them; write loss: listwise_kl to learn a teacher's"
        if problem:
            raise BadRow(origin, problem, preview(self.rows.raw.raw(row)))

    def _read_aligned(self, row: int, parsed: Row, origin: str) -> tuple[list[RowText], bool]:
        """As `_read_answer`, each text with what a teacher reads instead that reads by a tokenizer of its own."""
        own, cut = self._read_answer(row, parsed, origin)
        texts, any_cut, several = own, cut, len(self.aligners) > 1
        for name, aligner in self.aligners.items():
            who = f"teacher {name}" if several else "the teacher"
            as_teacher = replace(
                self,
                template=aligner.teacher.template,
                vocabulary_size=len(aligner.teacher.tokens.values),
                aligners={},
            )
            try:
                others, other_cut = as_teacher._read_answer(row, parsed, origin)
                readings = _readings(aligner, parsed, own, others, cut=cut or other_cut)
            except TooLong as error:
                raise TooLong(origin, f"as {who} reads it: {error.reason}") from None
            except BadRow:
                raise
            except DataError as error:
                text = f"of {who}: {error}" if several else str(error)
                raise BadRow(origin, text, preview(self.rows.raw.raw(row))) from error
            any_cut = any_cut or other_cut
            texts = [
                replace(text, readings={**text.readings, name: one}) if several else replace(text, reading=one)
                for text, one in zip(texts, readings, strict=True)
            ]
        return texts, any_cut

    def _read_answer(self, row: int, parsed: Row, origin: str) -> tuple[list[RowText], bool]:
        """Its texts, at least one, and whether anything of them was cut or left out."""
        prompted = parsed
        try:
            refuse_without_turns(parsed, self.dataset.loss_on)
            prompted = with_system_prompt(parsed, self.dataset.system_prompt)
            texts = self._tokenise(self._without_control(prompted))
        except TooManyTokens as error:
            raise self._too_long(origin, f"{error.num_tokens} tokens") from None
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}{_counted(prompted is not parsed, error)}") from error
        except DataError as error:
            problem = f"{error}{_counted(prompted is not parsed, error)}"
            raise BadRow(origin, problem, preview(self.rows.raw.raw(row))) from error
        problem = next(filter(None, map(self._id_problem, texts)), None)
        if problem is not None:
            raise BadRow(origin, problem, preview(self.rows.raw.raw(row)))
        return self._fit_all(texts, origin)

    def _teacher(self, row: int, origin: str) -> str:
        """Raises `BadRow` for a row whose column says no teacher."""
        route = self.asks.route
        if route is None:
            return self.asks.teacher
        raw = self.rows.raw.raw(row)
        value = raw.get(route.column)
        written = value if isinstance(value, str) else json.dumps(value, default=repr)  # as the keys of YAML are read
        if route.column in raw and written in route.map:
            return route.map[written]
        shown = repr(value) if isinstance(value, str) else written
        what = f"is {shown}, which" if route.column in raw else "is missing, and"
        known = ", ".join(route.map)
        raise BadRow(origin, f"{route.column}: {what} is not in route.map (there are: {known})", preview(raw))

    def _teacher_weights(self, row: int, origin: str) -> dict[str, float] | None:
        """Raises `BadRow` for a row whose column holds no weights of the ensemble's teachers."""
        ensemble = self.asks.ensemble
        if ensemble is None or ensemble.weights_column is None:
            return None
        raw = self.rows.raw.raw(row)
        try:
            return weights_of(raw.get(ensemble.weights_column), ensemble.teachers)
        except ValueError as error:
            raise BadRow(origin, f"{ensemble.weights_column}: {error}", preview(raw)) from None

    def remarks(self, row: int) -> tuple[str | None, str | None]:
        """The first special token in the text of a row, and the first mark of a picture, a sound or a film, each with
        its place. Raises `BadRow`."""
        parsed, origin = self.rows.read(row, needs_answer=self.to_write is None), self.rows.raw.origin(row)
        token, mark = self.template.special_tokens.first_in(parsed), media_mark_in(parsed)
        return (None if token is None else f"{origin}: {token}"), (None if mark is None else f"{origin}: {mark}")

    def _without_control(self, row: Row) -> Row:
        """The row as `data.special_tokens_in_text` wants it. Raises `DataError` where it refuses the row."""
        wanted = self.data.special_tokens_in_text
        if wanted not in ("escape", "error"):
            return row
        found = self.template.special_tokens.first_in(row)
        if found is not None and wanted == "error":
            raise DataError(
                f"{found} becomes a control token; write data.special_tokens_in_text: escape to read it as plain text, "
                "or allow where it is meant"
            )
        return row if found is None else self.template.special_tokens.escaped(row)

    def _tokenise(self, row: Row) -> tuple[RowText, ...]:
        match row:
            case CorpusRow() if self._rewrites:
                raise DataError("is plain text, in which there is no answer to rewrite")
            case CorpusRow():
                return (RowText(*self.template.render_corpus(row.text)),)
            case ChatRow():
                return self._render(row)
        return (RowText(*self.template.render_text(row.prompt, None if self._rewrites else row.completion)),)

    def _render(self, row: ChatRow) -> tuple[RowText, ...]:
        given = {"tools": row.tools, "arguments": row.template_arguments}
        if not row.answered and self.to_write is not None:
            return (RowText(self.template.render_prompt(row.messages, **given), None),)
        if self._rewrites:
            kept = row.messages[: row.loss_from or -1]
            return (RowText(self.template.render_prompt(kept, **given), None),)
        learnt = learnt_turns(row, self.dataset.loss_on)
        limit = None if self.data.on_too_long == "truncate" else self.data.max_length
        if self.asks.compared:
            return (self.template.render_pair(row.messages, learnt=learnt, max_tokens=limit, **given),)
        return self.template.render(row.messages, learnt=learnt, max_tokens=limit, **given)

    def _id_problem(self, text: RowText) -> str | None:
        ids = text.token_ids
        outside = ids[(ids < 0) | (ids >= self.vocabulary_size)]
        if len(outside):
            return f"token id {outside[0]} is outside the shared vocabulary 0..{self.vocabulary_size - 1}"
        if len(ids) == 0:
            return "becomes no token at all"
        if text.loss_mask is not None and not text.loss_mask.any():
            return "has no token whose prediction could be learnt"
        return None

    def _fit_all(self, texts: AbstractSequence[RowText], origin: str) -> tuple[list[RowText], bool]:
        """Those that fit. Of several, some may be too long: they are left out like rows, and what remains is a part of
        the conversation. Raises `TooLong` where none fits, or where none may be left out."""
        kept, cut = [], False
        too_long: TooLong | None = None
        for text in texts:
            try:
                fitted = self._fit(text, origin)
            except TooLong as error:
                if self.data.on_too_long == "error":
                    raise
                too_long, cut = too_long or error, True
                continue
            kept.append(fitted)
            cut = cut or fitted is not text
        if not kept:
            assert too_long is not None
            raise too_long
        return kept, cut

    def _fit(self, text: RowText, origin: str) -> RowText:
        limit, mask = self.data.max_length, text.loss_mask
        room = self.to_write.room if mask is None and self.to_write is not None else 0
        if len(text.token_ids) + room <= limit:
            return text
        length = f"{len(text.token_ids)} tokens" + (f" and {room} for the answer" if room else "")
        if self.data.on_too_long == "truncate" and mask is not None:
            kept = mask[:limit].copy()
            kept[-1] = False
            if kept.any():
                weights = None if text.row_weights is None else text.row_weights[:limit]
                return RowText(text.token_ids[:limit], kept, weights)
            raise TooLong(origin, f"too long: {length}, data.max_length is {limit}, and no answer begins before that")
        raise self._too_long(origin, length)

    def _too_long(self, origin: str, length: str) -> TooLong:
        return TooLong(
            origin,
            f"too long: {length}, data.max_length is {self.data.max_length}; raise data.max_length, or choose what "
            "happens to such rows with data.on_too_long: drop (left out and counted) or truncate (the beginning "
            "is kept)",
        )


def _readings(
    aligner: TextAligner, parsed: Row, texts: list[RowText], others: list[RowText], *, cut: bool
) -> list[Reading]:
    """Of each text of a row what the teacher reads in its place. Raises `DataError` where they do not belong
    together."""
    if len(texts) != len(others):
        raise DataError(
            f"becomes {len(texts)} texts by the student's chat template and {len(others)} by the teacher's, which "
            "cannot be aligned: write loss_on: last"
        )
    weighted = parsed.weight != 1 or any(text.row_weights is not None for text in texts)
    if aligner.parameters.chunked and weighted:
        raise DataError("has a weight, which chunks of several rows cannot have: remove it, or use align: overlap")
    return [
        Reading(other.token_ids) if other.loss_mask is None else aligner.reading(text, other, cut=cut)
        for text, other in zip(texts, others, strict=True)
    ]


def _counted(prompted: bool, error: Exception) -> str:
    """A word on the numbers of messages in an error, where `system_prompt` stands before them."""
    return " (messages are counted with system_prompt as messages[0])" if prompted and "messages[" in str(error) else ""
