"""Special tokens inside the text of rows: found, refused, or escaped to plain text.

A tokenizer turns these strings into control tokens wherever they occur. In a row they let text end a turn or a
document, for example in a conversation about chat templates, or <s> for struck-out text.

Escaping: a mark is put into each of them before the chat template is rendered. What is unmarked in the result is the
template's own. A copy of the tokenizer knows the special tokens under other names, and so sees none in a row's text:

    row     a </s> b  -> a <MARK/s> b -> template -> [INST] a <MARK/s> b [/INST] -> NAME a </s> b NAME -> ids
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from trainer.data.row import CandidatesRow, CorpusRow, PreferenceRow, Row, TextRow, texts_of
from trainer.errors import ConfigError, DataError, foreign_errors

MARK = "\ufdd0"  # these code points are no characters and stand in no text
_BEFORE, _BEHIND = "\ufdd1", "\ufdd2"


class SpecialTokens:
    """The special tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        named = set(tokenizer.all_special_tokens)
        added = tokenizer.added_tokens_decoder.values()
        self._texts = {token.content for token in added if token.content and (token.special or token.content in named)}

    def first_in(self, row: Row) -> str | None:
        """The first special token in the text of a row, as "field: 'token'"."""
        for field, text in texts_of(row):
            found = self._pattern.search(text)
            if found:
                return f"{field}: {found[0]!r}"
        return None

    def escaped(self, row: Row) -> Row:
        """The row with marks, for `ids`. Raises `DataError` where the text contains the code points of a mark."""
        for field, text in texts_of(row):
            if any(character in text for character in (MARK, _BEFORE, _BEHIND)):
                raise DataError(
                    f"{field}: contains one of the code points U+FDD0 to U+FDD2, which are no characters; remove it"
                )
        match row:
            case CorpusRow():
                return replace(row, text=self._marked(row.text))
            case PreferenceRow() | CandidatesRow():
                return row.each(self.escaped)
            case TextRow():
                completion = None if row.completion is None else self._marked(row.completion)
                return replace(row, prompt=self._marked(row.prompt), completion=completion)
        messages = tuple(
            {key: value if key == "role" else self._marked_in(value) for key, value in message.items()}
            for message in row.messages
        )
        arguments = {name: self._marked_in(value) for name, value in row.template_arguments.items()}
        return replace(row, messages=messages, tools=self._marked_in(row.tools), template_arguments=arguments)

    def ids(self, text: str) -> list[int]:
        """Ids of a text with marks, without any that the tokenizer adds. Raises `DataError` where the tokenizer's own
        vocabulary makes a special token of plain text."""
        named = self._pattern.sub(lambda found: self._names[found[0]], text).replace(MARK, "")
        copy, originals, special_ids = self._copy
        with foreign_errors("the tokenizer refuses the text", error=DataError):
            found = copy.encode(named, add_special_tokens=False).ids
        leaked = special_ids.intersection(found)  # out of the model's own vocabulary
        if leaked:
            token = self._tokenizer.convert_ids_to_tokens(min(leaked))
            raise DataError(
                f"contains {token!r}, of which this tokenizer makes a special token even as plain text; remove it, or "
                "write data.special_tokens_in_text: allow"
            )
        return [originals.get(token, token) for token in found]

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are plain text. Raises as `ids`."""
        return self.ids(self._marked(text))

    def _marked_in(self, value: Any) -> Any:
        """A JSON value with all its text marked, the names of fields included."""
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked_in(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._marked_in(item) for item in value)
        return value

    def _marked(self, text: str) -> str:
        while self._pattern.search(text):  # what is left of a token may hold another one
            text = self._pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return text

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._texts, key=lambda text: (-len(text), text))
        return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?!{MARK})" if self._texts else r"(?!)")

    @cached_property
    def _names(self) -> dict[str, str]:
        return {text: f"{_BEFORE}{number}{_BEHIND}" for number, text in enumerate(sorted(self._texts))}

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int, int], frozenset[int]]:
        """The copy, the ids of the original by its own of all added tokens, and the ids of the special ones."""
        if not self._tokenizer.is_fast:
            raise ConfigError(
                "data.special_tokens_in_text: escape needs a tokenizer with a tokenizer.json, and the teacher has "
                "none; write error or allow"
            )
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        originals = {}
        for token in content["added_tokens"]:
            if token["content"] in self._names:
                token |= {"content": self._names[token["content"]], "normalized": False}
            originals[token["content"]] = token["id"]
        content |= {"post_processor": None, "truncation": None, "padding": None}
        copy = Tokenizer.from_str(json.dumps(content))
        by_copy = {copy.token_to_id(text): number for text, number in originals.items()}
        return copy, by_copy, frozenset(originals[name] for name in self._names.values()) - by_copy.keys()
