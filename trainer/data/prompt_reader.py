"""One row as one prompt: read, rendered, tokenised, and measured against the length limit.

Training (`trainer/data/prompts.py`) and `check` read rows through the same reader.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from configs.prompts import Data, Dataset
from configs.section import MAIN
from configs.tasks import Route
from trainer.data.chat import Template, TooManyTokens
from trainer.data.row import ChatRow, CorpusRow, PreferenceRow, Row, preview, texts_of
from trainer.data.rows import Rows
from trainer.data.vocabulary import SharedVocabulary
from trainer.errors import BadRow, ConfigError, DataError, TooLong
from trainer.types import Prompt

MAX_CHARACTERS = 256
"""For each token that is allowed. No text has tokens of that length on average: a row of more is too long, and need not
be tokenised to know it, which takes seconds and gigabytes for the longest lines."""

_PAIR = (
    "is a pair of a chosen and a rejected answer, and no term of the objective compares answers; write loss: dpo, or "
    "the answer to learn as completion"
)
_NO_PAIR = "is no pair of answers, and the objective compares them; a preference has prompt, chosen and rejected"


@dataclass(frozen=True, slots=True)
class Asked:
    """The task that rows are read for, the teacher that is asked about them, and whether they must be preferences."""

    task: str = MAIN
    teacher: str = ""
    route: Route | None = None  # instead of `teacher`: by a column of the row
    pairs: bool = False  # every row is a preference; else none may be
    chosen: bool = False  # of a preference the chosen answer is read, as if it were the only one


@dataclass(frozen=True)
class PromptReader:
    """Random access to the rows of one dataset as prompts, for `PromptStream` and `check_rows`."""

    rows: Rows
    data: Data
    template: Template
    vocabulary_size: int
    needs_answer: bool
    room_for_answer: int
    rewrite: bool
    asks: Asked = Asked()

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        *,
        data: Data,
        template: Template,
        vocabulary: SharedVocabulary,
        needs_answer: bool,
        room_for_answer: int = 0,
        rewrite: bool = False,
        asks: Asked | None = None,
    ) -> PromptReader:
        """Without `needs_answer`, rows that have no answer become prompts without a loss mask, short enough for
        `room_for_answer` further tokens; with `rewrite`, so do the rows that have one.

        Raises `ConfigError` or `DataError` where the dataset as a whole cannot give what is asked.
        """
        rows = Rows.open(dataset)
        if room_for_answer >= data.max_length:
            raise ConfigError(
                f"an answer of up to {room_for_answer} tokens leaves no room for a prompt in data.max_length "
                f"{data.max_length}: raise data.max_length or lower answers.max_new_tokens"
            )
        return cls(rows, data, template, vocabulary.size, needs_answer, room_for_answer, rewrite, asks or Asked())

    def read(self, row: int, prompt_id: str) -> tuple[Prompt, bool]:
        """The prompt of a row, and whether it was truncated. Raises `TooLong` or `BadRow`; `ConfigError` for a template
        that fits no row."""
        origin = self.rows.raw.origin(row)
        parsed = self.rows.read(row, needs_answer=self.needs_answer)
        if isinstance(parsed, PreferenceRow) and self.asks.chosen:
            parsed = parsed.chosen
        num_characters = sum(len(text) for _, text in texts_of(parsed))
        if num_characters > MAX_CHARACTERS * self.data.max_length and self.data.on_too_long != "truncate":
            raise self._too_long(origin, f"{num_characters} characters")
        if isinstance(parsed, PreferenceRow) != self.asks.pairs:
            problem = _NO_PAIR if self.asks.pairs else _PAIR
            raise BadRow(origin, problem, preview(self.rows.raw.raw(row)))
        answers = (parsed.chosen, parsed.rejected) if isinstance(parsed, PreferenceRow) else (parsed,)
        problem = next(filter(None, map(_unrendered, answers)), None)
        if problem is not None:
            raise BadRow(origin, problem, preview(self.rows.raw.raw(row)))
        read = [self._read_answer(row, one, origin) for one in answers]
        (ids, mask, truncated), *others = read
        alternatives = tuple((ids, mask) for ids, mask, _ in others if mask is not None)
        prompt = Prompt(
            prompt_id,
            token_ids=ids,
            loss_mask=mask,
            origin=origin,
            task=self.asks.task,
            teacher=self._teacher(row, origin),
            alternatives=alternatives,
            weight=1.0 if isinstance(parsed, PreferenceRow) else parsed.weight,
        )
        return prompt, truncated or any(cut for _, _, cut in others)

    def _read_answer(self, row: int, parsed: Row, origin: str) -> tuple[np.ndarray, np.ndarray | None, bool]:
        """Token ids, loss mask, and whether they were truncated."""
        try:
            ids, mask = self._tokenise(self._without_control(parsed))
        except TooManyTokens as error:
            raise self._too_long(origin, f"{error.num_tokens} tokens") from None
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from error
        except DataError as error:
            raise BadRow(origin, str(error), preview(self.rows.raw.raw(row))) from error
        problem = self._id_problem(ids, mask)
        if problem is not None:
            raise BadRow(origin, problem, preview(self.rows.raw.raw(row)))
        return self._fit(ids, mask, origin)

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

    def special_token(self, row: int) -> str | None:
        """The first special token in the text of a row, with its place. Raises `BadRow`."""
        found = self.template.special_tokens.first_in(self.rows.read(row, needs_answer=self.needs_answer))
        return None if found is None else f"{self.rows.raw.origin(row)}: {found}"

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

    def _tokenise(self, row: Row) -> tuple[np.ndarray, np.ndarray | None]:
        limit = None if self.data.on_too_long == "truncate" else self.data.max_length
        match row:
            case CorpusRow() if self.rewrite:
                raise DataError("is plain text, in which there is no answer to rewrite")
            case CorpusRow():
                return self.template.render_corpus(row.text)
            case ChatRow():
                if not row.answered and not self.needs_answer:
                    return self.template.render_prompt(row.messages), None
                if self.rewrite:
                    kept = row.messages[: row.loss_from or -1]
                    return self.template.render_prompt(kept), None
                return self.template.render(
                    row.messages, loss_from=row.loss_from, context=row.context, max_tokens=limit
                )
        return self.template.render_text(row.prompt, None if self.rewrite else row.completion)

    def _id_problem(self, ids: np.ndarray, mask: np.ndarray | None) -> str | None:
        outside = ids[(ids < 0) | (ids >= self.vocabulary_size)]
        if len(outside):
            return f"token id {outside[0]} is outside the shared vocabulary 0..{self.vocabulary_size - 1}"
        if len(ids) == 0:
            return "becomes no token at all"
        if mask is not None and not mask.any():
            return "has no token whose prediction could be learnt"
        return None

    def _fit(self, ids: np.ndarray, mask: np.ndarray | None, origin: str) -> tuple[np.ndarray, np.ndarray | None, bool]:
        limit = self.data.max_length
        room = self.room_for_answer if mask is None else 0
        if len(ids) + room <= limit:
            return ids, mask, False
        length = f"{len(ids)} tokens" + (f" and {room} for the answer" if room else "")
        if self.data.on_too_long == "truncate" and mask is not None:
            kept = mask[:limit].copy()
            kept[-1] = False
            if kept.any():
                return ids[:limit], kept, True
            raise TooLong(origin, f"too long: {length}, data.max_length is {limit}, and no answer begins before that")
        raise self._too_long(origin, length)

    def _too_long(self, origin: str, length: str) -> TooLong:
        return TooLong(
            origin,
            f"too long: {length}, data.max_length is {self.data.max_length}; raise data.max_length, or choose what "
            "happens to such rows with data.on_too_long: drop (left out and counted) or truncate (the beginning "
            "is kept)",
        )


def _unrendered(row: Row) -> str | None:
    """What a row has that is not rendered yet."""
    if not isinstance(row, ChatRow):
        return None
    if row.tools is not None:
        return "tools: are not rendered yet; leave such rows out"
    if row.template_arguments:
        return "chat_template_kwargs: are not handed to the chat template yet; leave such rows out"
    for index, weight in row.turn_weights.items():
        if weight != 0:
            return f"messages[{index}]: has the weight {weight:g}, and only 0 and 1 are honoured yet"
    return None
