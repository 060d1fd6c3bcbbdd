"""Conversations and text as token ids, and which of them are answers; nothing else renders a chat template.

    messages, tools --> Conversation --rendered--> TurnFinder: texts with answers --tokenised--> RowText

The ids are those of a whole text; where an answer begins they must also be those that a generator would have read.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.conversation import NONE, Conversation, Tools
from trainer.data.rendering import HINT, RENDERER, Messages
from trainer.data.said import check_context, check_tools
from trainer.data.special_tokens import MARK, SpecialTokens
from trainer.data.template_arguments import argument_problem
from trainer.data.template_text import TOOL_USE, template_text, tools_text
from trainer.data.turn_end import TurnEnd, find_turn_end
from trainer.data.turns import AnswersInText, TooManyTokens, TurnFinder
from trainer.errors import ConfigError, DataError, foreign_errors
from trainer.types import RowText

MAX_ANSWERS = 1000
"""In one conversation: the work of finding them grows with its square."""

_NO_TEMPLATE = "the data are conversations, but the teacher's tokenizer has no chat template"


@dataclass(frozen=True)
class Template:
    """A tokenizer, a chat template, and the variables that it is given at each rendering. `text` is None where there is
    none: only plain text can be encoded then."""

    tokenizer: PreTrainedTokenizerBase
    text: str | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    with_tools: str | None = None  # instead of `text` for conversations with tools, where the tokenizer has two

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, path_override: str | Path | None = None) -> Template:
        """The template of a file if one is named, else the tokenizer's own. `ConfigError` for an unreadable one."""
        return cls(tokenizer, template_text(tokenizer, path_override), with_tools=tools_text(tokenizer, path_override))

    @property
    def saved(self) -> str | dict[str, str] | None:
        """As a tokenizer keeps it."""
        if self.text is None or self.with_tools is None:
            return self.text
        return {"default": self.text, TOOL_USE: self.with_tools}

    def given(self, arguments: Mapping[str, Any]) -> Template:
        """The template with these arguments. Raises `ConfigError` for one that it does not read."""
        problem = self._argument_problem(arguments, "template_arguments")
        if problem is not None:
            raise ConfigError(problem)
        return replace(self, arguments=arguments)

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
        return find_turn_end(
            self.tokenizer,
            lambda messages, generation_prompt=False: self._conversation(messages, None, NONE).render(
                generation_prompt=generation_prompt
            ),
        )

    def render_prompt(
        self, messages: Messages, *, tools: Tools | None = None, arguments: Mapping[str, Any] = NONE
    ) -> np.ndarray:
        """int32 [L]: what a generator reads to answer, generation header included. `arguments` win over the template's.

        Raises `DataError` for a conversation that the template refuses or of which it loses something.
        """
        conversation = self._conversation(messages, tools, arguments)
        text = conversation.render(generation_prompt=True)
        self._check_context(conversation, text, generation_prompt=True)
        return self._array(self._ids(text))

    def render(
        self,
        messages: Messages,
        *,
        learnt: Mapping[int, float] | None = None,
        tools: Tools | None = None,
        arguments: Mapping[str, Any] = NONE,
        max_tokens: int | None = None,
    ) -> tuple[RowText, ...]:
        """A whole conversation, with the assistant turns whose indices are in `learnt` in the loss, each to its
        end-of-turn token, with these weights; None: all of them, each with weight 1.

        One text, unless the template rewrites earlier turns: then each turn that no later rendering repeats is in a
        text of its own, as a generator would have read and written it. Raises `ConfigError` for a template from which
        answers cannot be told, `DataError` for a conversation that it refuses or whose answer merges with its header,
        `TooManyTokens` for a single text of more than `max_tokens`, before anything is done whose cost grows with the
        square of its turns.
        """
        conversation = self._conversation(messages, tools, arguments)
        if learnt is None:
            learnt = {index: 1.0 for index, message in enumerate(messages) if message["role"] == "assistant"}
        whole = conversation.render()
        ids = self._ids(whole)
        finder = TurnFinder(conversation.messages, conversation.render, self.turn_end)
        too_long = max_tokens is not None and len(ids) > max_tokens
        if too_long and not (learnt and finder.rewrites(min(learnt), whole)):
            raise TooManyTokens(len(ids))
        if len(learnt) > MAX_ANSWERS:
            raise DataError(f"has {len(learnt)} answers, at most {MAX_ANSWERS} are looked for: split the conversation")
        texts = finder.find(learnt, whole)
        self._check_context(conversation, whole)
        return tuple(
            self._answered(text, learnt, ids if text.text == whole else self._ids(text.text)) for text in texts
        )

    def render_pair(self, messages: Messages, **options: Any) -> RowText:
        """`render` for one of two conversations whose answers are compared, which must each be one text and all of one
        weight. Raises as it does, and `DataError` where they are not."""
        texts = self.render(messages, **options)
        if len(texts) > 1:
            raise DataError(
                "has several answers, and the chat template rewrites earlier turns, so they are no single text that "
                "could be compared: keep one answer in chosen and rejected, or write loss_on: last"
            )
        if texts[0].row_weights is not None:
            raise DataError("has answers of several weights, and answers that are compared cannot be weighted")
        return texts[0]

    def render_text(self, prompt: str, completion: str | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Plain text without a template: ids of prompt, completion and eos, with the latter two in the loss.

        The tokenizer's own leading tokens (bos) come first; there is an eos only where the tokenizer has one. Without a
        completion the ids of the prompt and None.
        """
        if completion is None:
            return self._array([*self._leading_ids, *self._ids(prompt)]), None
        whole = prompt + completion
        ids, leading = self._ids(whole), self._leading_ids
        (rows,) = self._rows(whole, [(len(prompt), len(whole))], ids=ids, before=len(leading))
        mask = np.zeros(len(leading) + len(ids), dtype=bool)
        mask[rows] = True
        return _append_learnt(self._array([*leading, *ids]), mask, self._eos_ids)

    def render_corpus(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """ids of (bos) text (eos); every token but the first is in the loss."""
        ids = self._array([*self._leading_ids, *self._ids(text), *self._eos_ids])
        mask = np.ones(len(ids), dtype=bool)
        mask[-1:] = False
        return ids, mask

    def plain_ids(self, text: str) -> list[int]:
        """ids of a text by itself, in which special tokens are plain text."""
        return self.special_tokens.plain_ids(text) if text else []

    def _answered(self, found: AnswersInText, learnt: Mapping[int, float], ids: list[int]) -> RowText:
        """`ids` are those of the text."""
        spans = [(answer.start, answer.stop) for answer in found.answers]
        rows = self._rows(found.text, spans, ids=ids)
        token_ids, mask = self._array(ids), np.zeros(len(ids), dtype=bool)
        weights = np.zeros(len(ids), dtype=np.float32)
        for answer, own in zip(found.answers, rows, strict=True):
            mask[own], weights[own] = True, learnt[answer.message]
        return RowText(token_ids, mask, None if (weights[mask] == 1).all() else weights)

    def _rows(
        self, text: str, spans: AbstractSequence[tuple[int, int]], *, ids: list[int], before: int = 0
    ) -> list[slice]:
        """The rows that predict the tokens inside each of the character spans of a text, whose ids are `ids`, where
        `before` further tokens come first."""
        borders = [before + border for border in self._borders(text, ids, [cut for span in spans for cut in span])]
        return [slice(max(first - 1, 0), stop - 1) for first, stop in zip(borders[::2], borders[1::2], strict=True)]

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

    def _conversation(self, messages: Messages, tools: Tools | None, arguments: Mapping[str, Any]) -> Conversation:
        """As the template gets it. Raises `DataError` for what it does not read."""
        if self.text is None:
            raise ConfigError(f"{_NO_TEMPLATE}: name a jinja file with teacher.chat_template")
        problem = self._argument_problem(arguments, "chat_template_kwargs")
        if problem is not None:
            raise DataError(problem)
        if tools and "tools" not in self._read:
            raise DataError(
                f"tools: the chat template does not read them, and calls of them would refer to nothing; {HINT}, or "
                "leave such rows out"
            )
        variables = {**self._variables, **arguments} if arguments else self._variables
        return Conversation.of(self.with_tools if tools and self.with_tools else self.text, messages, tools, variables)

    @staticmethod
    def _check_context(conversation: Conversation, text: str, *, generation_prompt: bool = False) -> None:
        """Raises `DataError` where the rendered text lacks tools, calls, or results of calls."""
        check_context(text, conversation.messages)
        if conversation.tools:
            try:
                without = replace(conversation, tools=None).render(generation_prompt=generation_prompt)
            except DataError:  # a template may refuse calls without tools
                without = ""
            check_tools(text, without, conversation.tools)

    def _argument_problem(self, arguments: Mapping[str, Any], place: str) -> str | None:
        if not arguments:
            return None
        if self.text is None:
            return f"{place}: there is no chat template that could read them; remove them, or {HINT}"
        return argument_problem(arguments, read=self._read, own=self.tokenizer.special_tokens_map, place=place)

    @cached_property
    def _read(self) -> frozenset[str]:
        """The variables that the template reads."""
        return frozenset().union(*(RENDERER.variables_of(text) for text in (self.text, self.with_tools) if text))

    @cached_property
    def _variables(self) -> Mapping[str, Any]:
        """What `apply_chat_template` tells a template of the tokenizer, and the template's arguments."""
        own = {name: _as_text(token) for name, token in self.tokenizer.special_tokens_map.items()}
        return {**own, **self.arguments}

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


def _as_text(token: Any) -> Any:
    return [str(item) for item in token] if isinstance(token, (list, tuple)) else str(token)


def _append_learnt(ids: np.ndarray, mask: np.ndarray, more: AbstractSequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask with `more` tokens at the end, their predictions in the loss."""
    longer = np.concatenate([mask, np.zeros(len(more), dtype=bool)])
    longer[len(ids) - 1 : len(longer) - 1] = True
    return np.concatenate([ids, np.asarray(more, dtype=np.int32)]), longer
