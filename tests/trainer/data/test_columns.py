"""`columns`: fields under the names that are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from given_rows import row_of, rows_of
from pydantic import ValidationError
from ruamel.yaml import YAML

from configs.prompts import Dataset
from trainer.data.row import ChatRow, CorpusRow, PreferenceRow, TextRow
from trainer.errors import ConfigError, DataError

TALK = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, {"q": "a", "a": " b"}, TextRow("a", " b")),
        ({"prompt": "question", "completion": "answer"}, {"question": "a", "answer": " b"}, TextRow("a", " b")),
        ({"completion": "response"}, {"prompt": "a", "response": " b"}, TextRow("a", " b")),
        ({"query": "prompt"}, {"prompt": "a", "response": "b"}, ChatRow(TALK, 0)),
        (
            {"instruction": "task.text", "output": "task.answers.0"},
            {"task": {"text": "a", "answers": ["b", "c"]}},
            ChatRow(TALK, 0),
        ),
        ({"messages": "body.messages"}, {"body": {"messages": TALK}}, ChatRow(TALK, 0)),
        ({"text": "content.raw"}, {"content.raw": "a", "content": {"raw": "b"}}, CorpusRow("a")),
        (
            {"prompt": "q", "chosen": "j", "rejected": "k"},
            {"q": "a", "j": " b", "k": " c"},
            PreferenceRow(TextRow("a", " b"), TextRow("a", " c")),
        ),
        ({"weight": "quality"}, {"text": "a", "quality": 0.5}, CorpusRow("a", 0.5)),
        ({"text": "body"}, {"body": "a", "text": "not this", "messages": TALK}, CorpusRow("a")),
        ({"messages": "messages"}, {"messages": TALK, "conversations": TALK}, ChatRow(TALK, 0)),
    ],
)
def test_a_mapped_field_is_read_under_our_name_and_wins(
    tmp_path: Path, columns: dict, row: dict, expected: object
) -> None:
    assert row_of(tmp_path, row, columns=columns) == expected


def test_a_row_without_the_column_has_null_there(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"q": "a", "a": " b"}, {"q": "c"}, columns={"prompt": "q", "completion": "a"})
    assert rows.read(1, needs_answer=False) == TextRow("c", None)


def test_a_column_that_no_row_has_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        rows_of(tmp_path, {"question": "a", "data": {"answer": "b"}}, columns={"prompt": "questoin"})
    assert str(caught.value).startswith("columns.prompt: no row of ")
    assert "has a field 'questoin'; did you mean 'question'? (found: question, data, data.answer)" in str(caught.value)
    with pytest.raises(ConfigError, match=r"columns.completion: .* has a field 'answer'; did you mean 'data.answer'"):
        rows_of(tmp_path, {"question": "a", "data": {"answer": "b"}}, columns={"completion": "answer"})


def test_only_fields_that_are_read_can_be_mapped() -> None:
    with pytest.raises(ValidationError, match=r"is no field that is read; did you mean 'prompt'\?"):
        Dataset(path="x", columns={"promt": "q"})
    with pytest.raises(ValidationError, match="name the field of the rows"):
        Dataset(path="x", columns={"prompt": " "})


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"problem": "a", "solution": "b", "level": "hard"}, {"question": "problem", "answer": "solution"}, TALK),
        ({"id": "x", "data": {"Input": "a", "target": "b"}}, {"question": "data.Input", "answer": "data.target"}, TALK),
        ({"body": {"messages": TALK}, "input": "x", "output": "y"}, {"messages": "body.messages"}, TALK),
        ({"turns": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"messages": "turns"}, TALK),
        ({"targets": "a b c"}, {"text": "targets"}, "a b c"),
    ],
)
def test_what_a_refusal_tells_to_write_reads_the_row(
    tmp_path: Path, row: dict, columns: dict, expected: object
) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, row)
    written = str(caught.value).rpartition("write columns: ")[2]
    assert YAML(typ="safe").load(written) == columns
    read = row_of(tmp_path, row, columns=columns)
    assert (read.messages if isinstance(read, ChatRow) else read.text) == expected


def test_a_question_alone_is_one_for_the_teacher(tmp_path: Path) -> None:
    row = {"problem": "a"}
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, row)
    written = str(caught.value).rpartition("by the teacher write ")[2]
    assert written == "format: question_answer, columns: {question: problem}"
    read = row_of(tmp_path, row, needs_answer=False, **YAML(typ="safe").load(f"{{{written}}}"))
    assert (read.messages, read.answered) == (TALK[:1], False)


def test_a_refusal_that_knows_no_field_says_how_they_are_mapped(tmp_path: Path) -> None:
    for row in ({"title": "a"}, {"a\x00": [1]}, {"list": [{"role": "user"}]}):
        with pytest.raises(DataError, match=r"mapped, as with columns: \{question: problem, answer: solution\}"):
            rows_of(tmp_path, row)
