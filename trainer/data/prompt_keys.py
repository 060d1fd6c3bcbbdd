"""By what two rows are told to ask the same: a key of each row's prompt, in which case and white space do not count.

Held-out rows are drawn by these keys, so that a question never stands on both sides, and overlaps are found by them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trainer.data.row import CandidatesRow, ChatRow, CorpusRow, PreferenceRow, Row, TextRow, texts_of
from trainer.data.rows import Rows
from trainer.errors import BadRow

UNREADABLE = np.uint64(0)


@dataclass(frozen=True, slots=True)
class PromptKeys:
    """Of rows of a dataset, in their order."""

    keys: np.ndarray  # uint64 [N]; UNREADABLE where the row cannot be read
    answered: np.ndarray  # bool [N]: whether the row has an answer


def keys_of(rows: Rows, numbers: Iterable[int] | None = None) -> PromptKeys:
    """Of the rows with these numbers, or all; each is read once."""
    found = [_key_of(rows, int(number)) for number in (range(len(rows)) if numbers is None else numbers)]
    keys = np.array([key for key, _ in found], dtype=np.uint64)
    return PromptKeys(keys, np.array([answered for _, answered in found], dtype=bool))


def _key_of(rows: Rows, number: int) -> tuple[int, bool]:
    try:
        row = rows.read(number, needs_answer=False)
    except BadRow:
        return 0, False
    return prompt_key(row), _is_answered(row)


def prompt_key(row: Row) -> int:
    """64 bits of a hash: of a conversation all before its last answer, of plain text all of it."""
    text = " ".join(" ".join(_prompt_texts(row)).casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()) or 1


def _prompt_texts(row: Row) -> Iterable[str]:
    match row:
        case PreferenceRow() | CandidatesRow():
            return _prompt_texts(row.best)
        case CorpusRow():
            return [row.text]
        case TextRow():
            return [row.prompt]
    last = len(row.messages) - (1 if row.answered else 0)
    kept = ChatRow(row.messages[:last], row.loss_from)
    return [text for place, text in texts_of(kept) if place.endswith("content")]


def _is_answered(row: Row) -> bool:
    match row:
        case ChatRow():
            return row.answered
        case TextRow():
            return row.completion is not None
    return True


def held_out_of(keys: PromptKeys, fraction: float, *, seed: int) -> np.ndarray:
    """bool [N]: which rows are held out. As near to that fraction of all rows as can be without more; rows with one
    prompt stay together, and those of which one has no answer, or cannot be read, are not taken.

    Which they are follows from prompts and seed alone, not from the order of rows or the name of a file.
    """
    wanted = round(fraction * len(keys.keys))
    prompts, group, sizes, candidates = _prompts_of(keys)
    taken = np.zeros(len(prompts), dtype=bool)
    num_taken = 0
    for number in np.argsort(_mixed(prompts, seed), kind="stable"):
        if num_taken == wanted:
            break
        if candidates[number] and num_taken + sizes[number] <= wanted:
            taken[number] = True
            num_taken += int(sizes[number])
    return taken[group]


def fewest_held_out(keys: PromptKeys) -> int | None:
    """The least number of rows, one at least, that can be held out; None where none can."""
    _, _, sizes, candidates = _prompts_of(keys)
    return int(sizes[candidates].min()) if candidates.any() else None


def _prompts_of(keys: PromptKeys) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Different prompts, which of them each row has [N], how many rows have it, and whether it can be held out."""
    prompts, group, sizes = np.unique(keys.keys, return_inverse=True, return_counts=True)
    num_answered = np.bincount(group, weights=keys.answered, minlength=len(prompts))
    return prompts, group, sizes, (num_answered == sizes) & (prompts != UNREADABLE)


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Another order of keys for each seed: splitmix64, whose every bit depends on every other."""
    mixed = keys + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
