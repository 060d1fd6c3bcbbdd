"""Conversations and text as token ids, and which of them are answers; nothing else renders a chat template.

Chat templates rarely mark what the model writes, so answers are found by rendered prefixes. For assistant turn i

    render(messages[:i], add_generation_prompt=True)   what a generator reads     ^ must be a prefix of
    render(messages[:i + 1])                           ... answer <end> rest   ^ must be, up to <end>, a prefix of
    render(messages)                                   the whole text

and the answer is what lies between the first and <end>, the end-of-turn token included. The ids are those of the whole
text; where an answer begins they must also be those that a generator would have read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.paths import expand_home
from trainer.data.rendering import HINT, RENDERER, Messages
from trainer.data.row_fields import REASONING
from trainer.data.special_tokens import MARK, SpecialTokens
from trainer.data.turn_end import TurnEnd, find_turn_end
from trainer.errors import ConfigError, DataError, foreign_errors

MAX_TEMPLATE_CHARACTERS = 2**20
MAX_ANSWERS = 1000
"""In one conversation: the work of finding them grows with its square."""

_NO_TEMPLATE = "the data are conversations, but the teacher's tokenizer has no chat template"


class TooManyTokens(DataError):
    """A conversation of more tokens than asked for; its answers were not looked for."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens")
        self.num_tokens = num_tokens

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return (TooManyTokens, (self.num_tokens,))


@dataclass(frozen=True)
class Template:
    """A tokenizer and a chat template. `text` is None where there is none: only plain text can be encoded then."""

    tokenizer: PreTrainedTokenizerBase
    text: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, path_override: str | Path | None = None) -> Template:
        """The template of a file if one is named, else the tokenizer's own. `ConfigError` for an unreadable one."""
        if path_override is not None:
            return cls(tokenizer, _read_template(path_override))
        if not tokenizer.chat_template:
            return cls(tokenizer, None)
        with foreign_errors("cannot read the chat template of the teacher's tokenizer", hint=HINT):
            text = str(tokenizer.get_chat_template())
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            raise ConfigError(f"the teacher's chat template has {len(text)} characters, too many to be one; {HINT}")
        return cls(tokenizer, text)

    @property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the template's end-of-turn token, without a template the tokenizer's eos."""
        if self.text is not None:
            return (self.turn_end.token_id,)
        return () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids after which nothing more is written: those that end a turn, and the tokenizer's eos, which ends plain
        text."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*self.end_of_turn_ids, *([] if eos is None else [eos])]))

    @cached_property
    def turn_end(self) -> TurnEnd:
        """Raises `ConfigError` for a template from which no student could learn to stop."""
        return find_turn_end(self.tokenizer, self._render)

    def render_prompt(self, messages: Messages) -> np.ndarray:
        """int32 [L]: what a generator reads to answer, generation header included."""
        return self._array(self._ids(self._render(self._conversation(messages), generation_prompt=True)))

    def render(
        self,
        messages: Messages,
        *,
        loss_from: int = 0,
        context: Collection[int] = (),
        max_tokens: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [L] and loss mask bool [L] (shifted, `trainer/types.py`) of a whole conversation.

        The mask holds the predictions of the tokens of the assistant turns from index `loss_from` on, each to its
        end-of-turn token, without those in `context`. Raises `ConfigError` for a template that is not prefix-stable,
        `DataError` for a conversation that it refuses or whose answer merges with its header, `TooManyTokens` for one
        of more than `max_tokens`, before anything is done whose cost grows with the square of its turns.
        """
        messages = self._conversation(messages)
        whole = self._render(messages)
        ids = self._ids(whole)
        if max_tokens is not None and len(ids) > max_tokens:
            raise TooManyTokens(len(ids))
        answers = [
            index
            for index in range(loss_from, len(messages))
            if messages[index]["role"] == "assistant" and index not in context
        ]
        if len(answers) > MAX_ANSWERS:
            raise DataError(f"has {len(answers)} answers, at most {MAX_ANSWERS} are looked for: split the conversation")
        spans = [self._answer(messages, index, whole) for index in answers]
        return self._encode(whole, spans, ids=ids)

    def render_text(self, prompt: str, completion: str | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Plain text without a template: ids of prompt, completion and eos, with the latter two in the loss.

        The tokenizer's own leading tokens (bos) come first; there is an eos only where the tokenizer has one. Without a
        completion the ids of the prompt and None.
        """
        if completion is None:
            return self._array([*self._leading_ids, *self._ids(prompt)]), None
        whole = prompt + completion
        ids, mask = self._encode(whole, [(len(prompt), len(whole))], ids=self._ids(whole), leading=self._leading_ids)
        return _append_learnt(ids, mask, self._eos_ids)

    def render_corpus(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """ids of (bos) text (eos); every token but the first is in the loss."""
        ids = self._array([*self._leading_ids, *self._ids(text), *self._eos_ids])
        mask = np.ones(len(ids), dtype=bool)
        mask[-1:] = False
        return ids, mask

    def _answer(self, messages: Messages, index: int, whole: str) -> tuple[int, int]:
        """Where the answer of turn `index` lies in the rendered conversation, end-of-turn token included."""
        end = self.turn_end
        header = self._render(messages, num=index, generation_prompt=True)
        turn = whole if index + 1 == len(messages) else self._render(messages, num=index + 1)
        turn_name = f"messages[{index}]"
        if not turn.startswith(header):
            raise _unstable(turn_name, "the prompt of this turn", header, "the conversation up to it", turn)
        answer = turn[len(header) :].removesuffix(end.suffix)
        content = messages[index]["content"]
        if not turn.endswith(end.suffix) or not answer.rstrip().endswith(content.strip()):
            raise ConfigError(
                f"{turn_name}: the chat template does not render this answer as it stands, followed by {end.suffix!r}: "
                f"it becomes {turn[len(header) :][-120:]!r}; {HINT}"
            )
        stop = len(turn) - len(end.suffix) + end.num_characters
        if not whole.startswith(turn[:stop]):
            raise _unstable(turn_name, "the conversation up to this turn", turn[:stop], "the whole conversation", whole)
        return len(header), stop

    def _encode(
        self,
        text: str,
        spans: AbstractSequence[tuple[int, int]],
        *,
        ids: list[int],
        leading: AbstractSequence[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids of `leading` and the text, whose own are `ids`; the mask holds the predictions of the tokens inside the
        character spans."""
        borders = self._borders(text, ids, [cut for span in spans for cut in span])
        ids = self._array([*leading, *ids])
        mask = np.zeros(len(ids), dtype=bool)
        for first, stop in zip(borders[::2], borders[1::2], strict=True):
            mask[max(len(leading) + first - 1, 0) : len(leading) + stop - 1] = True
        return ids, mask

    def _borders(self, text: str, whole: list[int], cuts: AbstractSequence[int]) -> list[int]:
        """For each cut of a text, whose ids are `whole`, the number of tokens before it.

        Where tokenising the pieces gives the tokens of the whole, the cuts are token borders. Otherwise (tokenizers
        that treat the beginning of a text specially) every prefix is tokenised by itself.
        """
        pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        if MARK in text:
            parts = [self._ids(piece) for piece in pieces]
        else:  # in one call, which costs a fraction of many
            with foreign_errors("the tokenizer refuses the text", error=DataError):
                parts = self.tokenizer(pieces, add_special_tokens=False)["input_ids"]
        if [token for part in parts for token in part] == whole:
            return list(accumulate(len(part) for part in parts[:-1]))
        borders = []
        for cut in cuts:
            prefix = self._ids(text[:cut])
            if whole[: len(prefix)] != prefix:
                raise DataError(
                    f"the answer's beginning {text[cut : cut + 16]!r} merges into one token with the text before it "
                    f"({text[max(0, cut - 24) : cut]!r}), so no generator could have produced these tokens: remove the "
                    "white space at the beginning of the answer, or move the one at the end of the prompt there"
                )
            borders.append(len(prefix))
        return borders

    def _render(self, messages: Messages, *, num: int | None = None, generation_prompt: bool = False) -> str:
        """The first `num` messages rendered, all of them without."""
        if self.text is None:
            raise ConfigError(f"{_NO_TEMPLATE}: name a jinja file with teacher.chat_template")
        return RENDERER.render(
            self.text,
            messages,
            variables=self._variables,
            num_messages=len(messages) if num is None else num,
            generation_prompt=generation_prompt,
        )

    def _conversation(self, messages: Messages) -> tuple[Mapping[str, Any], ...]:
        """The messages as they are sent to the template. Raises `DataError` for text that it would not render."""
        for index, message in enumerate(messages):
            for field in REASONING:
                if message.get(field) and not re.search(rf"\b{field}\b", self.text or ""):
                    raise DataError(
                        f"messages[{index}].{field}: the chat template does not read it, and it would be lost; remove "
                        "it, or name a template that does with teacher.chat_template"
                    )
        return tuple(dict(message) for message in messages)

    @cached_property
    def _variables(self) -> Mapping[str, Any]:
        """What `apply_chat_template` tells a template of the tokenizer."""
        return {name: _as_text(token) for name, token in self.tokenizer.special_tokens_map.items()}

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """What the tokenizer makes control tokens of; texts that it has marked are rendered as any others."""
        return SpecialTokens(self.tokenizer)

    def _ids(self, text: str) -> list[int]:
        if MARK in text:
            return self.special_tokens.ids(text)
        with foreign_errors("the tokenizer refuses the text", error=DataError):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _leading_ids(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text (bos, for Llama and Gemma; nothing for Qwen)."""
        bare, dressed = self._ids("a"), self.tokenizer("a")["input_ids"]
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        return tuple(dressed[:at])

    @property
    def _eos_ids(self) -> tuple[int, ...]:
        return () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)

    @staticmethod
    def _array(ids: AbstractSequence[int]) -> np.ndarray:
        return np.asarray(ids, dtype=np.int32)


def _read_template(named: str | Path) -> str:
    """A template file; devices and files without end are none."""
    with foreign_errors(f"teacher.chat_template: cannot read {named}"):
        path = expand_home(named)
        if path.exists() and not path.is_file():
            raise ConfigError(f"teacher.chat_template: {named} is no file; name a jinja file")
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEMPLATE_CHARACTERS + 1)
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise ConfigError(
            f"teacher.chat_template: {named} has over {MAX_TEMPLATE_CHARACTERS} characters, too many for a template"
        )
    return text


def _as_text(token: Any) -> Any:
    return [str(item) for item in token] if isinstance(token, (list, tuple)) else str(token)


def _append_learnt(ids: np.ndarray, mask: np.ndarray, more: AbstractSequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask with `more` tokens at the end, their predictions in the loss."""
    longer = np.concatenate([mask, np.zeros(len(more), dtype=bool)])
    longer[len(ids) - 1 : len(longer) - 1] = True
    return np.concatenate([ids, np.asarray(more, dtype=np.int32)]), longer


def _unstable(turn: str, first_name: str, first: str, second_name: str, second: str) -> ConfigError:
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
    return ConfigError(
        f"{turn}: the chat template is not prefix-stable, so the answer cannot be told from the rest: at character "
        f"{at} {first_name} has {first[at : at + 60]!r}, {second_name} has {second[at : at + 60]!r}; {HINT} "
        "(or use single-turn data, if only earlier turns change)"
    )
