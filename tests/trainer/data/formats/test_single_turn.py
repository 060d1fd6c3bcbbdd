"""A question and an answer in fields of their own: a conversation of two turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from given_rows import problem_of, row_of, rows_of

from trainer.data.row import ChatRow, CorpusRow, TextRow
from trainer.errors import DataError


def talk(*texts: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


@pytest.mark.parametrize(
    ("row", "row_format", "texts"),
    [
        (
            {"instruction": "Sum up.", "input": "A still drips.", "output": "Drips."},
            "alpaca",
            ("Sum up.\nA still drips.", "Drips."),
        ),
        ({"instruction": "Sum up.", "input": "", "output": "Drips."}, "alpaca", ("Sum up.", "Drips.")),
        (
            {"instruction": "Sum up.", "output": "Drips.", "text": "Below is an instruction"},
            "alpaca",
            ("Sum up.", "Drips."),
        ),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, "alpaca", ("a", "b", "c", "d")),
        ({"instruction": "c", "output": "d", "history": '[["a", "b"]]'}, "alpaca", ("a", "b", "c", "d")),
        (
            {"instruction": "Sum up.", "context": "A still.", "response": "Drips."},
            "dolly",
            ("Sum up.\nA still.", "Drips."),
        ),
        (
            {"instruction": "Sum up.", "input": "A still.", "response": "Drips."},
            "dolly",
            ("Sum up.\nA still.", "Drips."),
        ),
        ({"query": "What drips?", "response": "The still."}, "query_response", ("What drips?", "The still.")),
        (
            {"question": "What drips?", "answer": "The still.", "id": 3},
            "question_answer",
            ("What drips?", "The still."),
        ),
    ],
)
def test_a_question_and_its_answer_are_two_turns(tmp_path: Path, row: dict, row_format: str, texts: tuple) -> None:
    rows = rows_of(tmp_path, row)
    assert rows.format == row_format
    assert rows.read(0, needs_answer=True) == ChatRow(talk(*texts), loss_from=0)


def test_a_system_text_comes_first(tmp_path: Path) -> None:
    row = row_of(tmp_path, {"instruction": "a", "output": "b", "system": "Be brief."})
    assert row == ChatRow(({"role": "system", "content": "Be brief."}, *talk("a", "b")), loss_from=0)


@pytest.mark.parametrize("answer", [{"output": None}, {"output": ""}])
def test_an_answer_that_is_to_be_written_may_be_empty(tmp_path: Path, answer: dict) -> None:
    row = {"instruction": "a", "history": [["x", "y"]], **answer}
    read = row_of(tmp_path, row, needs_answer=False)
    assert (read.messages, read.answered) == (talk("x", "y", "a"), False)
    assert "output: is " in problem_of(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": 3}, "output: must be text, not a number"),
        ({"instruction": " ", "output": "b"}, "instruction: is empty"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "input: must be text, not a list"),
        (
            {"question": "a", "context": "x", "answer": "b"},
            "context: is not read beside question; write columns: {instruction: question, context: context, output: ",
        ),
        ({"instruction": "a", "input": "x", "context": "y", "output": "b"}, "context: input says what the instruction"),
        (
            {"question": json.dumps(talk("a")), "answer": "b"},
            "question: is a conversation as JSON text, whose JSON would be the question; write columns: {messages:",
        ),
        (
            {"question": "a", "answer": json.dumps([{"role": "assistant", "content": "b"}])},
            "answer: is messages as JSON text, and what they answer is text",
        ),
        ({"question": "a", "answer": {"text": ["b"]}}, "answer: must be text, not an object"),
        (
            {"query": "a", "response": "b", "history": [["c"]]},
            "history[0]: must be a [question, answer] pair, not a list",
        ),
        ({"query": "a", "response": "b", "history": [["c", 1]]}, "history[0][1]: must be text, not a number"),
        (
            {"query": "a", "response": "b", "history": "c"},
            "history: must be a list of [question, answer] pairs, and this",
        ),
        ({"query": "a", "response": "b\ud800"}, "response: is not text: lone surrogate"),
    ],
)
def test_what_is_wrong_is_named_by_its_field(tmp_path: Path, row: dict, message: str) -> None:
    assert problem_of(tmp_path, row).startswith(message)


def test_a_row_that_may_be_read_in_two_ways_is_refused_with_both(tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b", "question": "c", "answer": "d"}
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: instruction and output: the row has question and answer too, and"
    ):
        rows_of(tmp_path, row)
    assert row_of(tmp_path, row, format="question_answer").messages == talk("c", "d")
    assert row_of(tmp_path, {**row, "prompt": "e", "completion": " f"}) == TextRow("e", " f")


def test_plain_text_is_what_has_no_other_format(tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b", "text": "Below is an instruction"}
    assert row_of(tmp_path, row, format="text") == CorpusRow("Below is an instruction")


def test_an_answer_that_is_a_conversation_written_out_is_learnt_as_it_stands(tmp_path: Path) -> None:
    written = json.dumps(talk("a", "b"))
    assert row_of(tmp_path, {"instruction": "Write a talk.", "output": written}).messages[1]["content"] == written
    assert row_of(tmp_path, {"prompt": "A talk:", "completion": written}) == TextRow("A talk:", written)


def test_a_prompt_and_its_completion_may_be_json_text(tmp_path: Path) -> None:
    asked, answer = talk("a", "b")
    row = {"prompt": json.dumps([asked]), "completion": json.dumps([answer])}
    assert row_of(tmp_path, row) == ChatRow((asked, answer), 1)
    assert row_of(tmp_path, {"prompt": row["prompt"]}, needs_answer=False) == ChatRow((asked,), 1)
    assert "this is Python's notation" in problem_of(tmp_path, {"prompt": str([asked]), "completion": "b"})
