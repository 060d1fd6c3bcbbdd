"""Checks that teacher and student have the same tokenizer, and finds the true size of their vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from configs.models import ModelSource
from trainer.errors import ConfigError, foreign_errors

_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs, 2024-07-26: 1234567890.",
    "  two  spaces\t\ttabs\n\n\nlines \r\n end  ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # code\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
    "Zürich, naïve, Ελλάδα, Привет, 中文字符, 日本語, 한국어, العربية, हिन्दी, e\u0301 ﬁ Ⅳ",
    "👩‍🚀🇨🇭 ≠ ∑ √2 → ∞ \u200b\u00a0\ufeff",
    "I'm you've WE'LL don't; http://x.y/z?q=1&r=%20 <b>html</b> {\"json\": [1, 2.5e-3, null]}",
    "",
    " ",
    "\n",
)


@dataclass(frozen=True, eq=False, slots=True)
class TeacherVocabulary:
    """Of a teacher whose tokenizer is another than the student's, or may be."""

    size: int
    fingerprint: str
    rows: int  # embedding rows, >= size
    student_ids: np.ndarray  # int32 [size]: the student's id of the same token, or -1


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """What all models agree on; where some teachers do not, that of the student."""

    size: int  # V: ids are 0 .. V - 1; rows of a model beyond are padding
    fingerprint: str  # of the token -> id map
    teacher_rows: int  # embedding rows, >= V
    student_rows: int
    others: Mapping[str, TeacherVocabulary] = field(default_factory=dict)  # by teacher, of those that are aligned

    def of_teacher(self, name: str) -> SharedVocabulary | TeacherVocabulary:
        """By which a teacher reads; `size` and `fingerprint` of both kinds mean the same."""
        return self.others.get(name, self)


def check_pair(
    teacher: ModelSource, student: ModelSource, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> SharedVocabulary:
    """Loads both tokenizers and configurations. The tokenizers must be equal; the models' rows may be padded.

    `tokenizer` is the teacher's, where it is loaded already. Raises `ConfigError` saying what differs, both sizes, or
    which file is missing.
    """
    first, second = tokenizer or load_tokenizer(teacher), load_tokenizer(student)
    difference = tokenizer_difference(first, second)
    if difference is not None:
        raise ConfigError(
            f"teacher {teacher.path} ({len(first.get_vocab())} tokens) and student {student.path} "
            f"({len(second.get_vocab())} tokens) have different tokenizers: {difference}. Write align: overlap (by "
            "tokens that both have), align: chunks (by stretches of text, with labels: token) or align: uld (sorted "
            "probabilities), choose a student of the teacher's family, or make one from the teacher with `stillhouse "
            "prune`"
        )
    size = size_of(first)
    return SharedVocabulary(
        size=size,
        fingerprint=fingerprint(first),
        teacher_rows=model_rows(teacher, size),
        student_rows=model_rows(student, size),
    )


def size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """V: the largest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def model_rows(source: ModelSource, size: int) -> int:
    """Embedding rows of a model whose tokenizer has ids below `size`. Raises `ConfigError` where they are fewer."""
    rows = _load(source, AutoConfig, "config.json").get_text_config().vocab_size
    if rows < size:
        raise ConfigError(
            f"the model {source.path} has {rows} embedding rows (vocab_size), its tokenizer makes ids up to "
            f"{size - 1}: the tokenizer belongs to another model, or the embeddings must be resized"
        )
    return rows


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Raises `ConfigError` where there is no model or no tokenizer."""
    return _load(source, AutoTokenizer, "tokenizer")


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex characters, equal for equal token -> id maps."""
    digest = hashlib.blake2b(digest_size=8)
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index}\0{token}\0".encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()


def tokenizer_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """None where both turn any text into the same ids, as far as the maps, the merges and the probe texts tell.

    Chat templates and the choice of bos, eos and pad token may differ: base and instruction models of a family do.
    """
    return (
        _vocabulary_difference(first, second) or _merges_difference(first, second) or _probe_difference(first, second)
    )


def _vocabulary_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    mine, other = first.get_vocab(), second.get_vocab()
    tokens = [token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token)]
    if not tokens:
        return None
    tokens.sort(key=lambda token: (min(mine.get(token, 2**62), other.get(token, 2**62)), token))
    shown = ", ".join(
        f"{t!r} is {_id(mine, t)} for the teacher and {_id(other, t)} for the student" for t in tokens[:4]
    )
    return f"{len(tokens)} token(s) differ, first {shown}"


def _id(vocabulary: dict[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "absent"


def _merges_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    mine, other = _merges(first), _merges(second)
    if mine is None or other is None or mine == other:
        return None
    at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    return (
        f"the merges differ from number {at} on ({mine[at : at + 1]} for the teacher, {other[at : at + 1]} for the "
        f"student; {len(mine)} and {len(other)} merges)"
    )


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """The ordered merges (BPE) or scored pieces (unigram); None for a tokenizer without a `tokenizer.json` form."""
    if not tokenizer.is_fast:
        return None
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") == "Unigram":
        return model["vocab"]
    return model.get("merges")


def _probe_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    specials = [token.content for _, token in sorted(first.added_tokens_decoder.items())]
    for probe in (*_PROBES, *(f"a {token}b {token} \n" for token in specials)):
        with foreign_errors(
            "the tokenizers cannot encode a text", hint="correct tokenizer.json, tokenizer_config.json"
        ):
            mine, other = (t(probe, add_special_tokens=False)["input_ids"] for t in (first, second))
        if mine != other:
            return f"the same text {probe[:60]!r} becomes {mine[:12]} for the teacher and {other[:12]} for the student"
    return None


def _load(source: ModelSource, loader: Any, what: str) -> Any:
    path = Path(source.path).expanduser()
    if source.path.startswith((".", "/", "~")) and not path.is_dir():
        raise ConfigError(f"the model folder {source.path} does not exist (looked for {path.absolute()})")
    place = str(path) if path.is_dir() else source.path
    where = "the folder" if path.is_dir() else "no such folder here, and from the hub"
    with foreign_errors(f"cannot load the {what} of {source.path} ({where})"):
        return loader.from_pretrained(place, revision=source.revision, trust_remote_code=source.trust_remote_code)
