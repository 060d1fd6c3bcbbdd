"""Rows of every format from every kind of file, and what each kind of damaged row is told."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from configs.schema import Dataset
from trainer.errors import ConfigError, DataError
from trainer.row_files import BadRow
from trainer.rows import ChatRow, CorpusRow, Rows, TextRow

USER = {"role": "user", "content": "What drips?"}
ANSWER = {"role": "assistant", "content": "The still."}
SYSTEM = {"role": "system", "content": ""}
GOOD = {"messages": [USER, ANSWER]}


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def open_rows(path: Path, **options: object) -> Rows:
    return Rows.open(Dataset(path=str(path), **options))


def problem(rows: Rows, row: int, *, needs_answer: bool = True) -> str:
    with pytest.raises(BadRow) as caught:
        rows.read(row, needs_answer=needs_answer)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "row_format", "expected"),
    [
        (GOOD, "messages", ChatRow((USER, ANSWER), 0)),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion", ChatRow((USER, ANSWER), 1)),
        ({"prompt": "a", "completion": " b"}, "prompt_completion", TextRow("a", " b")),
        ({"prompt": "a"}, "prompt", TextRow("a", None)),
        ({"prompt": [SYSTEM, USER]}, "prompt", ChatRow((SYSTEM, USER), 0)),
        ({"text": "drip"}, "text", CorpusRow("drip")),
        ({"text": "x", "prompt": "y", **GOOD}, "messages", ChatRow((USER, ANSWER), 0)),
    ],
)
def test_the_format_is_told_by_the_columns(tmp_path: Path, row: dict, row_format: str, expected: object) -> None:
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", [row]))
    assert rows.format == row_format
    assert rows.read(0, needs_answer=row_format not in ("prompt",)) == expected


def test_a_forced_format_wins_and_a_missing_column_is_one_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "x", **GOOD}])
    assert open_rows(path, format="text").format == "text"
    with pytest.raises(DataError, match=r"no row has the field\(s\) prompt and completion .* found: text, messages"):
        open_rows(path, format="prompt_completion")
    with pytest.raises(DataError, match=r"fit no format; found: conversations; needed: messages"):
        open_rows(write_lines(tmp_path / "sharegpt.jsonl", [{"conversations": []}]))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json", "folder", "saved", "lines.json", "a.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    values = [{"messages": [USER, {**ANSWER, "content": f"answer {i}"}]} for i in range(3)]
    path = tmp_path / name
    table = datasets.Dataset.from_list(values)
    match name:
        case "a.parquet":
            table.to_parquet(path)
        case "a.arrow":
            table.save_to_disk(tmp_path / "disk")
            next((tmp_path / "disk").glob("*.arrow")).rename(path)
        case "a.json":
            path.write_text(json.dumps(values))
        case "folder":
            path.mkdir()
            write_lines(path / "train.jsonl", values)
        case "saved":
            table.save_to_disk(path)
        case "lines.json":
            write_lines(path, values)
        case "a.jsonl.gz":
            import gzip

            path.write_bytes(gzip.compress(write_lines(tmp_path / "x.jsonl", values).read_bytes()))
    rows = open_rows(path)
    assert [rows.read(i, needs_answer=True).messages[1]["content"] for i in range(len(rows))] == [
        "answer 0",
        "answer 1",
        "answer 2",
    ]
    assert rows.raw.origin(2) == (f"{path}:3" if name == "lines.json" else f"{path}[row 2]")
    assert len(open_rows(path, max_rows=2)) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"messages": [USER]}, "messages: no assistant turn"),
        ({"messages": []}, "messages: is empty"),
        ({"messages": "hi"}, "messages: must be a list of {role, content} messages, not a string"),
        ({"messages": None}, "messages: must be a list of {role, content} messages, not null"),
        ({"messages": ["hi"]}, "messages[0]: must be an object with role and content, not a string"),
        ({"prompt": "x"}, "messages: is missing"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content: is missing"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "messages[1].content: must be text, not null"),
        ({"messages": [USER, {**ANSWER, "content": 3}]}, "messages[1].content: must be text, not a number"),
        ({"messages": [USER, {**ANSWER, "content": []}]}, "messages[1].content: must be text, not a list"),
        ({"messages": [USER, {**ANSWER, "content": " \n"}]}, "messages[1].content: is empty"),
        ({"messages": [USER, {**ANSWER, "role": "gpt"}]}, "messages[1].role: unknown role 'gpt'"),
        ({"messages": [ANSWER, USER]}, "messages[0].role: the first turn must be system or user, not 'assistant'"),
        ({"messages": [USER, USER, ANSWER]}, "messages[1].role: the turn after 'user' must be assistant, not 'user'"),
        ({"messages": [USER, ANSWER, SYSTEM]}, "messages[2].role: the turn after 'assistant' must be user"),
        ({"messages": [SYSTEM]}, "messages: no assistant turn"),
        ({"messages": [USER, {**ANSWER, "content": "a\ud800"}]}, "messages[1].content: is not text: lone surrogate"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "messages[1].tool_calls: tool calls are not supported"),
        ({**GOOD, "tools": "[]"}, "tools: tool calls are not supported"),
        ([1, 2], "must be a JSON object with named fields, not a list"),
    ],
)
def test_a_bad_conversation_is_named_by_file_line_and_field(tmp_path: Path, bad: object, message: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [GOOD, bad, GOOD])
    rows = open_rows(path)
    assert problem(rows, 1).startswith(f"{path}:2: {message}")
    assert rows.read(2, needs_answer=True) == ChatRow((USER, ANSWER), 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "a"}, "completion: is missing"),
        ({"prompt": "a", "completion": None}, "completion: is null"),
        ({"prompt": "a", "completion": ""}, "completion: is empty"),
        ({"prompt": " ", "completion": "b"}, "prompt: is empty"),
        ({"prompt": "a", "completion": 5}, "completion: must be text, not a number"),
        ({"prompt": None, "completion": "b"}, "prompt: must be text, not null"),
        ({"completion": "b"}, "prompt: is missing"),
        ({"prompt": "a", "completion": [ANSWER]}, "completion: is a list of messages but prompt is text"),
        ({"prompt": [USER], "completion": "b"}, "completion: is text but prompt is a list of messages"),
        ({"prompt": [USER], "completion": []}, "completion: is empty"),
        ({"prompt": [USER], "completion": [USER]}, "completion[0].role: the turn after 'user' must be assistant"),
        ({"prompt": [USER, ANSWER], "completion": [ANSWER]}, "prompt[1].role: a prompt must end with a user turn"),
    ],
)
def test_a_bad_pair_is_named_by_file_line_and_field(tmp_path: Path, bad: object, message: str) -> None:
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, bad]))
    assert f"rows.jsonl:2: {message}" in problem(rows, 1)


def test_a_missing_answer_is_no_mistake_where_the_teacher_writes(tmp_path: Path) -> None:
    pairs = open_rows(write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c"}]))
    assert pairs.read(1, needs_answer=False) == TextRow("c", None)
    talks = open_rows(write_lines(tmp_path / "b.jsonl", [{"messages": [USER]}]))
    assert not talks.read(0, needs_answer=False).answered
    silent = open_rows(write_lines(tmp_path / "c.jsonl", [{"messages": [SYSTEM]}]))
    assert "only a system turn" in problem(silent, 0, needs_answer=False)


def damaged(folder: Path, name: str) -> Path:
    """Six good lines with one damage (reference list of damaged files)."""
    lines = [json.dumps({"messages": [USER, {**ANSWER, "content": f"é {i}"}]}, ensure_ascii=False) for i in range(6)]
    path = folder / f"{name}.jsonl"
    encoding = "utf-8"
    match name:
        case "broken_line":
            lines[2] = lines[2][:40]
        case "broken_syntax":
            lines[2] = lines[2].replace(":", "=", 1)
        case "extra_field":
            lines[2] = json.dumps({"messages": [{**USER, "name": "Ann"}, ANSWER], "meta": {"a": 1}})
        case "nan":
            lines[2] = lines[2][:-1] + ', "score": NaN}'
        case "huge_int":
            lines[2] = lines[2][:-1] + ', "score": ' + "9" * 30 + "}"
        case "blank_lines":
            lines[2:2] = ["", "   ", "\t"]
        case "latin1":
            encoding = "latin-1"
        case "bom":
            encoding = "utf-8-sig"
        case "utf16":
            encoding = "utf-16"
        case "huge_line":
            lines[2] = json.dumps({"messages": [USER, {**ANSWER, "content": "x" * 20 * 2**20}]})
        case "deep":
            lines[2] = '{"messages": ' + "[" * 10_000 + "]" * 10_000 + "}"
    text = "\n".join(lines) + "\n"
    path.write_bytes(text[:-20].encode() if name == "truncated_tail" else text.encode(encoding))
    return path


@pytest.mark.parametrize("name", ["extra_field", "nan", "huge_int", "blank_lines", "bom"])
def test_harmless_oddities_leave_all_rows_as_they_are(tmp_path: Path, name: str) -> None:
    rows = open_rows(damaged(tmp_path, name))
    contents = [rows.read(i, needs_answer=True).messages[1]["content"] for i in range(len(rows))]
    expected = [f"é {i}" for i in range(6)]
    if name == "extra_field":
        expected[2] = ANSWER["content"]
        assert rows.read(2, needs_answer=True).messages[0]["name"] == "Ann"
    assert contents == expected
    if name == "blank_lines":
        assert rows.raw.origin(2).endswith(":6")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("broken_line", 2, r":3: not a JSON object: .* ends too early \(was the file cut off\?\)"),
        ("broken_syntax", 2, r":3: not a JSON object: Expecting ':' delimiter at column 12; write one JSON object per"),
        ("truncated_tail", 5, r":6: not a JSON object: .* ends too early"),
        ("latin1", 2, r":3: not UTF-8: byte 0xE9 at byte \d+ of the line; save the file as UTF-8"),
        ("huge_line", 2, r":3: the line has 20 MB, the limit is 16 MB"),
        ("deep", 2, r":3: not a row: JSON nested too deeply"),
    ],
)
def test_a_damaged_line_is_named_and_the_others_stay_readable(
    tmp_path: Path, name: str, row: int, message: str
) -> None:
    path = damaged(tmp_path, name)
    if name == "latin1":  # only one line is damaged
        good = damaged(tmp_path, "nothing").read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*good[:2], path.read_bytes().splitlines(keepends=True)[2], *good[3:]]))
    rows = open_rows(path)
    with pytest.raises(BadRow, match=message):
        rows.read(row, needs_answer=True)
    others = [i for i in range(len(rows)) if i != row]
    assert len(others) == 5
    assert all(rows.read(i, needs_answer=True).answered for i in others)


def test_what_is_no_dataset_at_all_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    (tmp_path / "empty.json").write_text("[]")
    for name in ("empty.jsonl", "blank.jsonl", "empty.json"):
        with pytest.raises(DataError, match=rf"the dataset .*{name} has no rows"):
            open_rows(tmp_path / name)
    with pytest.raises(DataError, match="is UTF-16 text: save it as UTF-8"):
        open_rows(damaged(tmp_path, "utf16"))
    with pytest.raises(ConfigError, match=r"nowhere.jsonl does not exist"):
        open_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot tell the format of .*rows.txt"):
        open_rows(tmp_path / "rows.txt")
    (tmp_path / "fake.parquet").write_text("x")
    with pytest.raises(DataError, match=r"cannot read the dataset .*fake.parquet"):
        open_rows(tmp_path / "fake.parquet")
    (tmp_path / "cut.json").write_text('[{"messages": [')
    with pytest.raises(DataError, match=r"cannot read the dataset .*cut.json"):
        open_rows(tmp_path / "cut.json")
    with pytest.raises(ConfigError, match=r"cannot find the dataset no-such-owner/no-such-data: .* hub"):
        Rows.open(Dataset(path="no-such-owner/no-such-data"))


def test_a_split_that_does_not_exist_is_a_configuration_error(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(ConfigError, match="one file without splits: remove split: test"):
        open_rows(lines, split="test")
    datasets.Dataset.from_list([GOOD]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="test"):
        open_rows(tmp_path / "a.parquet", split="test")


def test_a_file_whose_rows_are_all_broken_says_why(tmp_path: Path) -> None:
    path = tmp_path / "pretty.jsonl"
    path.write_text(json.dumps(GOOD, indent=2))
    with pytest.raises(BadRow, match=r"pretty.jsonl:1: not a JSON object"):
        open_rows(path)


def test_a_table_row_is_named_by_its_number(tmp_path: Path) -> None:
    datasets.Dataset.from_list([GOOD, {"messages": [USER]}]).to_parquet(tmp_path / "a.parquet")
    assert "a.parquet[row 1]: messages: no assistant turn" in problem(open_rows(tmp_path / "a.parquet"), 1)
