"""Rows of every format from every kind of file, and what each kind of damaged row is told."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from configs.prompts import Dataset
from trainer.data.row import ChatRow, CorpusRow, PreferenceRow, TextRow
from trainer.data.rows import Rows
from trainer.errors import BadRow, ConfigError, DataError

USER = {"role": "user", "content": "What drips?"}
ANSWER = {"role": "assistant", "content": "The still."}
OTHER = {**ANSWER, "content": "no"}
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
        ({"prompt": "a"}, "prompt_completion", TextRow("a", None)),
        ({"prompt": [SYSTEM, USER]}, "prompt_completion", ChatRow((SYSTEM, USER), 2)),
        ({"text": "drip"}, "text", CorpusRow("drip")),
        (
            {"prompt": "a", "chosen": " b", "rejected": " c"},
            "preference",
            PreferenceRow(TextRow("a", " b"), TextRow("a", " c")),
        ),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
            "preference",
            PreferenceRow(ChatRow((USER, ANSWER), 1), ChatRow((USER, OTHER), 1)),
        ),
        ({"text": "x", "prompt": "y", **GOOD}, "messages", ChatRow((USER, ANSWER), 0)),
    ],
)
def test_the_format_is_told_by_the_fields(tmp_path: Path, row: dict, row_format: str, expected: object) -> None:
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", [row]))
    assert rows.format == row_format
    assert rows.read(0, needs_answer=False) == expected


def test_a_forced_format_wins_and_a_row_without_its_field_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "x", **GOOD}])
    assert open_rows(path, format="text").read(0, needs_answer=True) == CorpusRow("x")
    assert "rows.jsonl:1: prompt: is missing" in problem(open_rows(path, format="prompt"), 0, needs_answer=False)
    shared = write_lines(tmp_path / "sharegpt.jsonl", [{"conversations": []}])
    assert "messages: is missing; the fields are those of ShareGPT: write format: sharegpt" in problem(
        open_rows(shared, format="messages"), 0
    )
    pair = write_lines(tmp_path / "pair.jsonl", [{"prompt": "a", "completion": "b"}])
    assert open_rows(pair, format="prompt").read(0, needs_answer=False) == TextRow("a", None)


FOREIGN = {
    "segments": ({"segments": [{"label": True, "text": "a"}]}, "axolotl's segments: write prompt and completion"),
    "an answer alone": ({"response": "a"}, "to learn response as plain text write columns: {text: response}"),
    "tokens": ({"input_ids": [1, 2]}, "tokens: give the text"),
    "nothing": ({"id": 3}, "the fields fit no format; found: id; needed: messages, or prompt and completion"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_format_of_another_trainer_is_named_with_how_to_convert_it(tmp_path: Path, name: str) -> None:
    row, message = FOREIGN[name]
    with pytest.raises(DataError, match=r"rows.jsonl:1: the fields fit no format; found: ") as caught:
        open_rows(write_lines(tmp_path / "rows.jsonl", [row]))
    assert message in str(caught.value)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_with_its_rows_below_a_key_says_how_to_write_it(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [{"question": "a?", "answer": "b"}] * 2}, indent=indent))
    alone = "write that list alone" if indent is None else r"all in a list, \[{...}, {...}\]"
    with pytest.raises((BadRow, DataError), match=rf"rows\.json:1: .*{alone}"):
        open_rows(path)


def write_as(folder: Path, kind: str, rows: list[dict]) -> Path:
    lines = write_lines(folder / "rows.jsonl", rows)
    columns = dict.fromkeys(key for row in rows for key in row)
    table = datasets.Dataset.from_list([dict.fromkeys(columns) | row for row in rows])
    match kind:
        case "jsonl":
            return lines
        case "jsonl.gz":
            (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
        case "json":
            (folder / "rows.json").write_text(json.dumps(rows))
        case "parquet":
            table.to_parquet(folder / "rows.parquet")
        case "arrow":
            table.save_to_disk(folder / "disk")
            next((folder / "disk").glob("*.arrow")).rename(folder / "rows.arrow")
    return folder / f"rows.{kind}"


KINDS = ("jsonl", "jsonl.gz", "json", "parquet", "arrow")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_that_begin_late_in_a_file_are_read(tmp_path: Path, kind: str) -> None:
    late = [{"prompt": f"q {i}", "completion": f" a {i}"} for i in range(100, 120)]
    early = [{"prompt": f"q {i}"} for i in range(100)]
    path = write_as(tmp_path, kind, [*early, *late])
    for options in ({}, {"format": "prompt_completion"}):
        rows = open_rows(path, **options)
        assert rows.read(3, needs_answer=False) == TextRow("q 3", None)
        assert rows.read(110, needs_answer=False) == TextRow("q 110", " a 110")
        assert "completion: is " in problem(rows, 99)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_another_format_is_refused_at_its_place(tmp_path: Path, kind: str) -> None:
    path = write_as(tmp_path, kind, [{"prompt": "a", "completion": " b"}] * 105 + [GOOD, {"text": "c"}])
    rows = open_rows(path)
    assert "messages: the row is of another format than the first one, which is read by its prompt" in problem(
        rows, 105
    )
    assert "text: the row is of another format" in problem(rows, 106)
    assert rows.read(104, needs_answer=True) == TextRow("a", " b")


@pytest.mark.parametrize("flag", ["weight", "loss_weight", "loss", "loss_mask", "train", "training", "trainable"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_answer_marked_as_not_to_be_learnt_is_context(tmp_path: Path, flag: str, kind: str) -> None:
    no, yes = (0, 1) if "weight" in flag else (False, True)
    talk = [USER, {**ANSWER, flag: no}, USER, {**ANSWER, flag: yes}]
    rows = open_rows(write_as(tmp_path, kind, [{"messages": talk}]))
    assert rows.read(0, needs_answer=True) == ChatRow((USER, ANSWER, USER, ANSWER), 0, {1: 0.0})


def test_an_answer_may_count_more_or_less_than_others(tmp_path: Path) -> None:
    talk = [USER, {**ANSWER, "weight": 0.25}, USER, {**ANSWER, "loss_scale": 2}, USER, {**ANSWER, "loss": True}]
    row = open_rows(write_lines(tmp_path / "rows.jsonl", [{"messages": talk, "weight": 3}])).read(0, needs_answer=True)
    assert (row.turn_weights, row.weight, row.context) == ({1: 0.25, 3: 2.0}, 3.0, frozenset())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages: every assistant turn is marked as not to be learnt"),
        ({"messages": [USER, {**ANSWER, "weight": -0.5}]}, "messages[1].weight: -0.5 is no weight: a message is"),
        ({"messages": [USER, {**ANSWER, "weight": float("nan")}]}, "messages[1].weight: nan is no weight"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, "messages[1].train: 'no' is no weight"),
        ({"messages": [USER, {**ANSWER, "weight": 1, "loss": 0.5}]}, "messages[1]: weight and loss contradict"),
        ({"messages": [USER, {**ANSWER, "weight": 1, "train": False}]}, "messages[1]: weight and train contradict"),
        ({"messages": [{**USER, "train": True}, ANSWER]}, "messages[0]: is marked as learnt, and only answers are"),
        ({"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]}, "prompt[1]: is marked as learnt"),
        (
            {"messages": [USER, {**ANSWER, "function_call": {"name": "f"}}]},
            "messages[1]: calls 'f', and the row has no tools",
        ),
        ({"messages": [USER, {**ANSWER, "masked": True}]}, "messages[1].masked: means the opposite of a mark"),
        ({"messages": [USER, {**ANSWER, "train_detail": [{}]}]}, "messages[1].train_detail: parts of a message"),
        ({"messages": [USER, {**ANSWER, "refusal": "I cannot"}]}, "messages[1].refusal: is not read; write its text"),
        ({"messages": [{**USER, "images": ["a.png"]}, ANSWER]}, "messages[0].images: only text is supported"),
        ({**GOOD, "functions": [{}]}, "functions[0].name: is missing"),
        ({**GOOD, "images": ["a.png"]}, "images: only text is supported"),
        (
            {"messages": [SYSTEM, USER, ANSWER], "system": "Be rude."},
            "system: messages[0] is a system turn too; keep one",
        ),
        ({**GOOD, "weight": 0}, "weight: must be a number above 0 and up to 1000000, not 0; leave out rows"),
        ({**GOOD, "weight": -0.5}, "weight: must be a number above 0"),
        ({**GOOD, "weight": float("nan")}, "weight: must be a number above 0"),
        ({**GOOD, "weight": 1e7}, "weight: must be a number above 0"),
        (
            {**GOOD, "weight": "0.5"},
            "weight: must be a number above 0 and up to 1000000, not '0.5'; leave out rows that are not to be learnt "
            "(this one is text, as all cells of a CSV file are",
        ),
        ({**GOOD, "weight": False}, "weight: must be a number above 0"),
        ({**GOOD, "loss_weight": 0.3}, "loss_weight: is not read, here it is 0.3; the weight of a row is named weight"),
        ({"prompt": "a", "chosen": " b", "rejected": " c", "weight": 0.5}, "weight: answers to compare cannot be"),
        ({**GOOD, "chat_template_kwargs": [1]}, "chat_template_kwargs: must be an object of variables, not a list"),
        (
            {**GOOD, "chosen": " b", "rejected": " c"},
            "rejected: belongs to a pair of a better and a worse answer, which format: preference",
        ),
        ({"prompt": "a", "completion": " b", "label": False}, "label: false marks an answer that must not be learnt"),
        (
            {"prompt": "a", "response": " b"},
            "response: looks like the answer, and only completion is read; write columns: {completion: response}",
        ),
        ({"prompt": "a", "completion": " b", "label": "False"}, "label: false marks an answer that must not be"),
        ({"instruction": "a", "output": "b", "kto_tag": False}, "kto_tag: false marks an answer that must not be"),
        ({**GOOD, "label": False}, "label: false marks an answer that must not be learnt"),
        ({**GOOD, "history": [["a", "b"]]}, "history: is not read here; write the earlier turns into messages"),
        ({**GOOD, "rejected_response": "c"}, "rejected_response: belongs to a pair of a better and a worse answer"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content: is missing"),
        ({"messages": [{**USER, "role": "a\ud800"}, ANSWER]}, "messages[0].role: is not text: lone surrogate \\ud800"),
        ({"messages": [{**USER, "name": "\udfff"}, ANSWER]}, "messages[0].name: is not text: lone surrogate"),
        ({"messages": [{**USER, "\ud800": 1}, ANSWER]}, "the name of a field of messages[0]: is not text"),
    ],
)
def test_a_field_that_changes_the_meaning_is_refused(tmp_path: Path, row: dict, message: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    said = problem(open_rows(path), 0)
    assert said.startswith(f"{path}:1: {message}")
    said.encode()


@pytest.mark.parametrize("row", [GOOD, {"messages": [USER, ANSWER]}, {"text": "a"}, {"prompt": "a"}])
def test_a_row_of_any_format_may_have_a_weight(tmp_path: Path, row: dict) -> None:
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", [row, {**row, "weight": 0.3}, {**row, "weight": 2}]))
    read = [rows.read(number, needs_answer=False) for number in range(3)]
    assert [one.weight for one in read] == [1.0, 0.3, 2.0]
    assert [replace(one, weight=1.0) for one in read] == [read[0]] * 3


def test_fields_that_say_nothing_and_metadata_change_nothing(tmp_path: Path) -> None:
    empty = {"tools": None, "images": [], "weight": 1, "system": "", "id": 7, "source": "web", "label": 3}
    turn = {**ANSWER, "tool_calls": None, "function_call": None, "weight": None}
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", [{"messages": [USER, turn], **empty}]))
    assert rows.read(0, needs_answer=True) == ChatRow((USER, ANSWER), 0)


ODD_NAMES = [
    "rows[1].parquet",
    "rows*.parquet",
    "rows?.parquet",
    "rows{1,2}.parquet",
    "rows[!a].parquet",
    "a b%20#.parquet",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_file_is_read_under_its_own_name_whatever_the_name(tmp_path: Path, name: str) -> None:
    for neighbour in ("rows1.parquet", "rowsb.parquet"):
        datasets.Dataset.from_list([{"text": "another file"}]).to_parquet(tmp_path / neighbour)
    datasets.Dataset.from_list([{"text": "mine"}]).to_parquet(tmp_path / name)
    assert open_rows(tmp_path / name).read(0, needs_answer=True) == CorpusRow("mine")


def test_names_that_the_reading_library_cannot_take_are_refused(tmp_path: Path) -> None:
    for folder, text in (("rows1", "another"), ("rows[1]", "mine")):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "train.jsonl", [{"text": text}])
    with pytest.raises(ConfigError, match=r"rows\[1\] contains one of .* reads such a name as a pattern"):
        open_rows(tmp_path / "rows[1]")
    datasets.Dataset.from_list([{"text": "x"}]).to_parquet(tmp_path / "x.parquet")
    chained = (tmp_path / "x.parquet").rename(tmp_path / "zip::x.parquet")
    with pytest.raises(ConfigError, match="cannot read names with ::"):
        open_rows(chained)
    with pytest.raises(ConfigError, match="does not exist"):
        Rows.open(Dataset(path="zip::train"))
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        Rows.open(Dataset(path="/dev/zero"))


def test_damaged_files_of_every_kind_are_one_clear_error(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "x.jsonl", [GOOD] * 50).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-20])
    (tmp_path / "no.jsonl.gz").write_bytes(b"no gzip at all")
    datasets.Dataset.from_list([GOOD] * 50).to_parquet(tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.arrow").write_bytes(b"ARROW1" + bytes(40))
    names = ["cut.jsonl.gz", "no.jsonl.gz", "cut.parquet", "no.arrow"]
    for number, damage in enumerate(("{", "[]", '{"_data_files": [{"filename": "../x.arrow"}]}', "null")):
        saved = tmp_path / f"saved{number}"
        datasets.Dataset.from_list([GOOD]).save_to_disk(saved)
        (saved / "state.json").write_text(damage)
        names.append(saved.name)
    for name in names:
        with pytest.raises(DataError, match=f"cannot read the dataset .*{name}"):
            open_rows(tmp_path / name)


@pytest.mark.parametrize("kind", ["saved", "rows.arrow"])
def test_a_table_of_damaged_offsets_is_an_error_and_no_crash(tmp_path: Path, kind: str) -> None:
    datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(4)]).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    offsets, damaged = (np.array(v, dtype="<i4").tobytes() for v in ([0, 5, 10, 15, 20], [0, 5, 2**30, 15, 20]))
    content = file.read_bytes()
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, damaged))
    if kind == "rows.arrow":
        file.rename(tmp_path / kind)
        with pytest.raises(DataError, match=r"cannot read the dataset .*rows.arrow: .*[Oo]ffset"):
            open_rows(tmp_path / kind)
    else:
        assert "[row 1]: cannot be read: " in problem(open_rows(tmp_path / kind, format="text"), 1)


def test_what_a_local_dataset_has_not_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([GOOD]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match="is one table without splits: remove split: test"):
        open_rows(tmp_path / "saved", split="test")
    for path in (tmp_path / "saved", write_lines(tmp_path / "rows.jsonl", [GOOD])):
        with pytest.raises(ConfigError, match="lies here and has no revisions: remove revision: main"):
            open_rows(path, revision="main")


def test_a_conversation_of_countless_turns_is_refused_before_it_is_looked_at(tmp_path: Path) -> None:
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "a"}] * 100_001}]))
    assert "messages: has 100001 turns, the limit is 100000; split" in problem(rows, 0)


def test_a_giant_row_of_a_table_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "x" * (17 * 2**20)}, {"text": "small"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    opened = open_rows(tmp_path / "a.parquet", format="text")
    assert "[row 0]: the row has 17 M characters, the limit is 16 M" in problem(opened, 0)
    assert opened.read(1, needs_answer=True) == CorpusRow("small")


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
            path.write_bytes(gzip.compress(write_lines(tmp_path / "x.jsonl", values).read_bytes()))
    rows = open_rows(path)
    assert [rows.read(i, needs_answer=True).messages[1]["content"] for i in range(len(rows))] == [
        "answer 0",
        "answer 1",
        "answer 2",
    ]
    assert rows.raw.origin(2) == (f"{path}:3" if name in ("lines.json", "a.jsonl.gz") else f"{path}[row 2]")
    assert len(open_rows(path, max_rows=2)) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"messages": [USER]}, "messages: no assistant turn"),
        ({"messages": []}, "messages: is empty"),
        ({"messages": "hi"}, "messages: must be a list of {role, content} messages, not a string"),
        ({"messages": None}, "messages: must be a list of {role, content} messages, not null"),
        ({"messages": ["hi"]}, "messages[0]: must be an object with role and content, not a string"),
        ({"prompt": "x"}, "prompt: the row is of another format than the first one, which is read by its messages"),
        ({"id": 1}, "messages: is missing"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content: is missing"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "messages[1].content: must be text, not null"),
        ({"messages": [USER, {**ANSWER, "content": 3}]}, "messages[1].content: must be text, not a number"),
        ({"messages": [USER, {**ANSWER, "content": []}]}, "messages[1].content: is empty"),
        ({"messages": [USER, {**ANSWER, "content": " \n"}]}, "messages[1].content: is empty"),
        (
            {"messages": [USER, {**ANSWER, "role": "clown"}]},
            "messages[1].role: unknown role 'clown'; write system, user",
        ),
        ({"messages": [ANSWER, USER]}, "messages[0].role: the first turn must be system or user, not 'assistant'"),
        ({"messages": [USER, USER, ANSWER]}, "messages[1].role: the turn after 'user' must be assistant, not 'user'"),
        ({"messages": [USER, ANSWER, SYSTEM]}, "messages[2].role: the turn after 'assistant' must be user"),
        ({"messages": [SYSTEM]}, "messages: no assistant turn"),
        ({"messages": [USER, {**ANSWER, "content": "a\ud800"}]}, "messages[1].content: is not text: lone surrogate"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [1]}]},
            "messages[1].tool_calls[0]: must be an object with a name",
        ),
        ({**GOOD, "tools": {"a": 1}}, "tools: must be a list of tools, {type: function, function: "),
        ({**GOOD, "tools": "none"}, "tools: must be a list of tools"),
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            json.dumps(GOOD, indent=2),
            ":1: .*one object stands on several lines: write each on a line of its own",
        ),
        ("a.jsonl", json.dumps([USER, ANSWER]), r':1: must be .* not a list; write {"messages": \[...\]}'),
        (
            "a.parquet",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of Git LFS and holds no",
        ),
    ],
)
def test_files_that_are_nearly_rows_say_what_they_are(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_rows(tmp_path / name)


def test_a_table_row_is_named_by_its_number(tmp_path: Path) -> None:
    datasets.Dataset.from_list([GOOD, {"messages": [USER]}]).to_parquet(tmp_path / "a.parquet")
    assert "a.parquet[row 1]: messages: no assistant turn" in problem(open_rows(tmp_path / "a.parquet"), 1)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "rejected: is the chosen answer"),
        ({"prompt": "a", "chosen": " b", "rejected": ""}, "rejected: is empty"),
        ({"prompt": "a", "chosen": [ANSWER], "rejected": " c"}, "chosen: is a list of messages but prompt is text"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [ANSWER]}, "chosen[0].role: the turn after 'user' must be"),
        ({"prompt": "a", "chosen": " b"}, "rejected: is missing; a preference has prompt, chosen and rejected"),
        ({"chosen": " b", "rejected": " c"}, "prompt: is missing"),
    ],
)
def test_half_a_preference_is_a_bad_row_that_names_the_field(tmp_path: Path, row: dict, text: str) -> None:
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", [row]), format="preference")
    assert problem(rows, 0).startswith(f"{tmp_path / 'rows.jsonl'}:1: {text}")
