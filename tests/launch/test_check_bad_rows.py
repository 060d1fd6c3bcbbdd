"""Bad rows are told by reason."""

from __future__ import annotations

from dataclasses import replace

from launch.check.bad_rows import bad_rows
from trainer.data.prompts import Remarked, RowReport
from trainer.errors import BadRow

BLANK = RowReport(
    num_rows=100,
    num_checked=100,
    num_ok=0,
    bad_rows=(),
    num_dropped=0,
    num_truncated=0,
    min_tokens=0,
    median_tokens=0,
    max_tokens=0,
    num_loss_tokens=0,
    num_answered=0,
    num_split=0,
    num_of_split=0,
    max_compared_tokens=0,
    special=Remarked(),
    media=Remarked(),
)


def told(*rows: BadRow) -> list[str]:
    return bad_rows("prompts", replace(BLANK, bad_rows=rows)).splitlines()


def test_equal_reasons_are_one_line_with_their_number_and_the_first_places() -> None:
    empty = [BadRow(f"rows.jsonl:{line}", "completion: is empty") for line in (3, 7, 9, 12, 40)]
    other = BadRow("rows.jsonl:5", "prompt: is missing")
    assert told(empty[0], other, *empty[1:]) == [
        "prompts: 6 of 100 rows cannot be used",
        "    rows.jsonl:3: completion: is empty (4 more: rows.jsonl:7, rows.jsonl:9, rows.jsonl:12, ...)",
        "    rows.jsonl:5: prompt: is missing",
    ]


def test_reasons_that_differ_in_numbers_are_one_line_and_say_so() -> None:
    assert told(*(BadRow(f"a.jsonl:{n}", f"too long: {90 + n} tokens") for n in (1, 2))) == [
        "prompts: 2 of 100 rows cannot be used",
        "    a.jsonl:1: too long: 91 tokens (1 more with other numbers: a.jsonl:2)",
    ]


def test_many_reasons_are_cut_and_counted() -> None:
    kinds = [BadRow(f"a.jsonl:{n}", f"{'x' * n} is wrong") for n in range(1, 14)]
    lines = told(*kinds, kinds[-1])
    assert len(lines) == 12
    assert lines[-1] == "    and 4 more, for 3 other reasons"


def test_a_dataset_of_which_nothing_is_left_says_why() -> None:
    text = bad_rows("tasks.chat.prompts", replace(BLANK, num_dropped=100))
    assert text == "tasks.chat.prompts: no row is left: 100 of 100 are too long; raise data.max_length"
