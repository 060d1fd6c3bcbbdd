"""Which ids of two vocabularies are the same token: by their bytes, special tokens by their role."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainer.align.token_bytes import TokenBytes

ABSENT_ID = -1

_Key = tuple[bytes, str, int]


def match_ids(teacher: TokenBytes, student: TokenBytes, *, roles: Mapping[int, int]) -> np.ndarray:
    """int32 [V of the teacher]: of each id the student's, or -1. No id of the student is there twice.

    `roles`: ids of the student by ids of the teacher, of tokens that end an answer; they go before all others. Other
    special tokens are the same where they have one name.
    """
    found = np.full(len(teacher.values), ABSENT_ID, dtype=np.int32)
    of_student = _by_key(student)
    taken = set(roles.values())
    for key, index in _by_key(teacher).items():
        other = of_student.get(key, ABSENT_ID)
        if other not in taken:
            found[index] = other
    for index, other in roles.items():
        found[index] = other
    return found


def _by_key(tokens: TokenBytes) -> dict[_Key, int]:
    """Ids by their bytes. Of a byte and a character that are the same, and of duplicates, each finds its like."""
    found: dict[_Key, int] = {}
    plain = {value for index, value in enumerate(tokens.values) if _kind(tokens, index) == "text"}
    for index, value in enumerate(tokens.values):
        if index in tokens.unknown or not value:
            continue
        kind = _kind(tokens, index)
        kind = "text" if kind == "byte" and value not in plain else kind
        nth = 0
        while (value, kind, nth) in found:
            nth += 1
        found[value, kind, nth] = index
    return found


def _kind(tokens: TokenBytes, index: int) -> str:
    if index in tokens.special:
        return "special"
    return "byte" if index in tokens.fallback else "text"
