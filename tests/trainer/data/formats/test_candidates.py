"""Several answers to a prompt, and what is wrong with a row of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from given_rows import problem_of, row_of, rows_of

from trainer.data.row import CandidatesRow, ChatRow, TextRow

USER = {"role": "user", "content": "What drips?"}
SAID = [{"role": "assistant", "content": text} for text in ("The still.", "The mill.", "Nothing.")]
TALKS = tuple(ChatRow((USER, answer), 1) for answer in SAID)


def test_candidates_are_the_same_in_every_notation(tmp_path: Path) -> None:
    texts = [answer["content"] for answer in SAID]
    for row in (
        {"prompt": [USER], "candidates": [[answer] for answer in SAID]},
        {"question": "What drips?", "candidates": texts},
        {"messages": [USER], "candidates": SAID},
        {"instruction": "What drips?", "input": "", "candidates": texts},
    ):
        rows = rows_of(tmp_path, row)
        assert (rows.format, rows.read(0, needs_answer=True)) == ("candidates", CandidatesRow(TALKS))
    text = row_of(tmp_path, {"prompt": "a", "candidates": [" b", " c"], "scores": [1, 2.5]})
    assert text == CandidatesRow((TextRow("a", " b"), TextRow("a", " c")), (1.0, 2.5))


def test_the_best_is_the_first_with_the_highest_score(tmp_path: Path) -> None:
    assert CandidatesRow(TALKS).best == TALKS[0]
    assert CandidatesRow(TALKS, (1.0, 3.0, 3.0)).best == TALKS[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": [" b"]}, "candidates: there is nothing to compare, 1 of at least 2"),
        ({"candidates": "b"}, "candidates: must be a list of answers, not a string"),
        ({"candidates": [" b", ""]}, "candidates.1: is empty"),
        ({"candidates": [" b", 3]}, "candidates.1: must be text, not a number"),
        ({"candidates": [" b", " c", " b"]}, "candidates.2: is candidate 0 again"),
        ({"scores": [1]}, "scores: must be a list of 2 numbers, one of each candidate, not 1 of them"),
        ({"scores": 0.5}, "scores: must be a list of 2 numbers, one of each candidate, not a number"),
        ({"scores": [1, "2"]}, "scores.1: must be a finite number, not '2'"),
        ({"scores": [True, 2]}, "scores.0: must be a finite number, not True"),
        ({"scores": [1, float("inf")]}, "scores.1: must be a finite number, not inf"),
        ({"weight": 0.5}, "weight: answers to compare cannot be weighted"),
        ({"prompt": None}, "prompt: is missing, which candidates.0 is an answer to"),
    ],
)
def test_what_is_wrong_is_named_by_its_field(change: dict, message: str, tmp_path: Path) -> None:
    row = {"prompt": "a", "candidates": [" b", " c"], "scores": [1, 2]} | change
    assert problem_of(tmp_path, row, format="candidates").startswith(message)
