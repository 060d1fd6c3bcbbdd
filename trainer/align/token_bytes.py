"""The bytes of text that each token of a vocabulary stands for, the only thing two tokenizers have in common.

byte-level BPE    every character of a token is a byte ("Ġthe" is b" the")       GPT-2, Llama 3, Qwen, SmolLM
sentencepiece     U+2581 is a space, <0x0A> is a byte, all else is UTF-8          Llama 2, Gemma, Mistral, T5
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.errors import ConfigError

UNKNOWN = b"\xff"
"""What an id stands for that stands for no text, such as <unk>. No byte of UTF-8."""

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_PROBE = "The quick brown fox, 2024-07-26:\n\tjumps over 13 lazy dogs."


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """A vocabulary as bytes."""

    values: tuple[bytes, ...]  # by id
    special: frozenset[int]  # control tokens, whose bytes are their names
    fallback: frozenset[int]  # <0x0A> and the like
    unknown: frozenset[int]  # ids that stand for no text

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, name: str = "the tokenizer") -> TokenBytes:
        """Raises `ConfigError` for a tokenizer whose tokens are no bytes of the text; `name` is for the message."""
        read = _reader(tokenizer, name)
        vocabulary = tokenizer.get_vocab()
        values: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            values[index] = read(token)
        added = tokenizer.added_tokens_decoder
        for index, token in added.items():
            values[index] = token.content.encode(errors="surrogatepass")
        if tokenizer.unk_token_id is not None:
            values[tokenizer.unk_token_id] = None
        special = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        fallback = {i for token, i in vocabulary.items() if _FALLBACK.fullmatch(token) and len(values[i] or b"") == 1}
        unknown = {index for index, value in enumerate(values) if value is None}
        known = tuple(UNKNOWN if value is None else value for value in values)
        made = cls(known, frozenset(special), frozenset(fallback), frozenset(unknown))
        ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        if (found := made.join(ids)).strip() != _PROBE.encode():
            raise ConfigError(
                f"{name} changes the text that it reads ({_PROBE[:20]!r} becomes {found[:20]!r}), so its tokens cannot "
                "be aligned with those of another by their bytes; choose a model with a byte-level BPE or a "
                "sentencepiece tokenizer"
            )
        return made

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [V]: bytes of each id."""
        return np.fromiter(map(len, self.values), dtype=np.int64, count=len(self.values))

    def join(self, ids: Iterable[int]) -> bytes:
        """The text of a row of ids; those of a model's padding, which it may write too, stand for none."""
        most = len(self.values)
        return b"".join([self.values[i] if i < most else UNKNOWN for i in ids])


def _reader(tokenizer: PreTrainedTokenizerBase, name: str) -> Callable[[str], bytes | None]:
    """The bytes of a token by its name in the vocabulary."""
    if not tokenizer.is_fast:
        raise ConfigError(f"{name} has no tokenizer.json, which says what its tokens stand for; add one to its folder")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = set(_types([content.get("pre_tokenizer"), content.get("decoder"), content.get("normalizer")]))
    if "ByteLevel" in parts:
        return _byte_level
    if parts & {"Metaspace", "ByteFallback"} or content["model"].get("byte_fallback") or _SPACE in str(parts):
        return _sentencepiece
    raise ConfigError(
        f"{name} is of type {content['model'].get('type')} with {', '.join(sorted(parts)) or 'no parts'}: only the "
        "tokens of byte-level BPE and of sentencepiece stand for bytes of the text, by which different tokenizers are "
        "aligned; choose another model"
    )


def _types(value: Any) -> Iterator[str]:
    """The types of all parts of a tokenizer.json, and of a Replace what it replaces."""
    if isinstance(value, dict):
        yield from ([str(value["type"])] if "type" in value else [])
        yield from (_types(list(value.values())) if value.get("type") != "Replace" else [str(value["pattern"])])
    elif isinstance(value, list):
        for part in value:
            yield from _types(part)


def _byte_level(token: str) -> bytes | None:
    known = all(character in _BYTES for character in token)
    return bytes(_BYTES[character] for character in token) if known else None


def _sentencepiece(token: str) -> bytes:
    byte = _FALLBACK.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode(errors="surrogatepass")


def _byte_characters() -> dict[str, int]:
    """Of byte-level BPE: printable bytes are themselves, the others are U+0100 and on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_characters()
