"""A prompt with several answers, the candidates, and perhaps a score of each.

prompt, candidates, scores                as in `preference`: all text, or conversations; scores may be missing
conversations or messages or instruction  what all answer, beside candidates
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.data.formats.format import Format
from trainer.data.formats.preference import answer_of
from trainer.data.formats.turns import talk_of
from trainer.data.formats.values import RowProblem, is_absent, kind_of
from trainer.data.row import CandidatesRow

_LEAST = 2


def _tells(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("candidates"), list) and not is_absent(row["candidates"])


def _read(row: Mapping[str, Any], needs_answer: bool) -> CandidatesRow:
    given = row.get("candidates")
    if not isinstance(given, list):
        found = "missing" if given is None else kind_of(given)
        raise RowProblem(f"candidates: must be a list of answers, not {found}; such rows have prompt and candidates")
    if len(given) < _LEAST:
        raise RowProblem(
            f"candidates: there is nothing to compare, {len(given)} of at least {_LEAST}; leave such rows out"
        )
    named = {f"candidates.{index}": talk_of(f"candidates.{index}", answer) for index, answer in enumerate(given)}
    if empty := next((name for name, answer in named.items() if is_absent(answer)), None):
        raise RowProblem(f"{empty}: is empty, and every candidate is an answer; leave it out")
    answers = tuple(answer_of({**row, **named}, name) for name in named)
    for index, answer in enumerate(answers):
        if answer in answers[:index]:
            raise RowProblem(
                f"candidates.{index}: is candidate {answers.index(answer)} again; name each answer to a prompt once"
            )
    return CandidatesRow(answers, _scores(row.get("scores"), num=len(answers)))


def _scores(scores: Any, *, num: int) -> tuple[float, ...] | None:
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != num:
        found = f"{len(scores)} of them" if isinstance(scores, list) else kind_of(scores)
        raise RowProblem(f"scores: must be a list of {num} numbers, one of each candidate, not {found}")
    for index, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise RowProblem(f"scores.{index}: must be a finite number, not {ascii(score)[:40]}")
    return tuple(map(float, scores))


CANDIDATES = Format("candidates", "candidate answers", "candidates", tells=_tells, read=_read)
