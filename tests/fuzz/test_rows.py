"""Row files as they come: rows are counted good or bad with their place, or the file is refused in one message."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import Damage, outcomes
from pydantic import ValidationError
from tiny_models import tiny_tokenizer

from configs.prompts import COLUMNS, Data, Dataset, RowFormat
from trainer.data.chat import Template
from trainer.data.prompt_reader import PromptReader
from trainer.data.prompts import RowReport, check_rows
from trainer.data.row import texts_of
from trainer.data.rows import Rows
from trainer.data.vocabulary import SharedVocabulary, fingerprint
from trainer.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer()
TEMPLATE = Template.of(TOKENIZER)
VOCABULARY = SharedVocabulary(len(TOKENIZER), fingerprint(TOKENIZER), teacher_rows=320, student_rows=320)


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


TALK = {"messages": [turn("system", "be kind"), turn("user", "who?"), turn("assistant", "the quick fox")]}
PAIR = {"prompt": [turn("user", "who?")], "completion": [turn("assistant", "the lazy dog")]}
TEXTS = {"prompt": "who jumps over", "completion": " the lazy dog"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}
ASKED = turn("user", "who?")
FOREIGN: list[dict[str, Any]] = [
    {"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "the fox"}], "system": "be kind"},
    {"conversation": [{"human": "who?", "assistant": "the fox"}]},
    {"messages": json.dumps(TALK["messages"])},
    {"messages": [{**ASKED, "content": [{"type": "text", "text": "who?"}]}, turn("assistant", "the fox")]},
    {
        "messages": [ASKED, CALL, {**turn("tool", "1"), "tool_call_id": "a"}, turn("assistant", "the fox")],
        "tools": TOOLS,
    },
    {"instruction": "who?", "input": "jumps", "output": "the fox", "history": [["a", "b"]]},
    {"query": "who?", "response": "the fox", "system": "be kind", "chat_template_kwargs": {"a": 1}},
    {"question": "who?", "answer": "the fox", "weight": 0.5},
    {"chosen": [ASKED, turn("assistant", "the fox")], "rejected": [ASKED, turn("assistant", "a dog")]},
    {
        "input": {"messages": [ASKED], "tools": TOOLS},
        "preferred_output": [CALL],
        "non_preferred_output": [turn("assistant", "no")],
    },
]
ROWS: list[dict[str, Any]] = [TALK, PAIR, TEXTS, {"prompt": "who?"}, {"text": "the quick brown fox"}, *FOREIGN]

GOOD = [json.dumps(TALK).encode()] * 6
CUT = json.dumps(TALK).encode()[:40]
NAMED: dict[str, bytes] = {
    "broken_line": b"\n".join([*GOOD[:2], CUT, *GOOD[2:]]) + b"\n",
    "truncated_tail": (b"\n".join(GOOD) + b"\n")[:-20],
    "type_change": b"\n".join([*GOOD, b'{"messages": "text"}']) + b"\n",
    "missing_field": b"\n".join([*GOOD, b'{"prompt": "who?"}']) + b"\n",
    "extra_field": b"\n".join([*GOOD, json.dumps(TALK | {"name": "x", "meta": {"a": 1}}).encode()]) + b"\n",
    "null_content": b"\n".join([*GOOD, b'{"messages": [{"role": "user", "content": null}]}']) + b"\n",
    "empty_file": b"",
    "blank_lines": b"\n\n".join([*GOOD, b"   "]) + b"\n",
    "bom": b"\xef\xbb\xbf" + b"\n".join(GOOD) + b"\n",
    "latin1": b"\n".join([*GOOD, json.dumps(TALK).encode().replace(b"kind", b"k\xe9nd")]) + b"\n",
    "array": b"[" + b",".join(GOOD) + b"]",
    "nan": b"\n".join([*GOOD, GOOD[0][:-1] + b', "score": NaN}']) + b"\n",
    "huge_int": b"\n".join([*GOOD, GOOD[0][:-1] + b', "score": ' + b"9" * 30 + b"}"]) + b"\n",
    "longer_int": b"\n".join([*GOOD, GOOD[0][:-1] + b', "score": ' + b"9" * 5000 + b"}"]) + b"\n",
    "deep": b"\n".join([*GOOD, b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"]) + b"\n",
    "surrogate": b"\n".join([*GOOD, GOOD[0].replace(b"kind", b"\\ud800")]) + b"\n",
}


def look(file: Path, **options: Any) -> RowReport:
    """As `stillhouse check` does."""
    dataset = Dataset(path=str(file), **options)
    data = Data(max_length=64, on_bad_row="skip")
    reader = PromptReader.open(dataset, data=data, template=TEMPLATE, vocabulary=VOCABULARY)
    report = check_rows(reader, budget=200)
    assert report.num_checked == report.num_ok + report.num_dropped + len(report.problems)
    assert all(problem.startswith(str(file)) and len(problem) < 2000 for problem in report.problems), report.problems
    return report


def write_damaged(folder: Path, seed: int) -> Path:
    """Lines of one format, damaged as values or as bytes."""
    damage = Damage(seed)
    base = damage.random.choice(ROWS)
    rows: list[Any] = [base] * damage.random.choice([1, 5, 130])
    if damage.random.random() < 0.7:
        rows = [damage.tree(row) if damage.random.random() < 0.3 else row for row in rows]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if damage.random.random() < 0.5:
        content = damage.bytes(content)
    name = damage.random.choice(["rows.jsonl", "rows.jsonl", "rows.ndjson", "rows.json", "rows.txt"])
    (folder / name).write_bytes(content)
    return folder / name


def write_damaged_table(folder: Path, seed: int) -> Path:
    """A file that `datasets` reads, damaged as bytes."""
    damage = Damage(seed)
    rows = [TALK, TALK] if damage.random.random() < 0.5 else [TEXTS, TEXTS]
    kind = damage.random.choice(["json", "parquet", "arrow", "gz", "folder"])
    file = folder / f"seed-{seed}" / {"gz": "rows.jsonl.gz", "folder": "saved"}.get(kind, f"rows.{kind}")
    file.parent.mkdir()
    if kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(str(file))
        part = damage.random.choice(sorted(path for path in file.iterdir() if path.is_file()))
        part.write_bytes(damage.bytes(part.read_bytes())) if damage.random.random() < 0.8 else part.unlink()
        return file
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        content = json.dumps([damage.tree(row) for row in rows]).encode()
        file.write_bytes(gzip.compress(content) if kind == "gz" else content)
    if damage.random.random() < 0.8:
        file.write_bytes(damage.bytes(file.read_bytes()))
    return file


@pytest.mark.parametrize("name", NAMED)
def test_each_kind_of_damage_costs_its_row_alone_or_is_one_message(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(NAMED[name])
    if name in ("empty_file", "array"):
        with pytest.raises((ConfigError, DataError), match=r"rows\.jsonl"):
            look(file)
        return
    report = look(file)
    assert report.num_ok >= 5
    assert len(report.problems) <= 1


@pytest.mark.timeout(600)
def test_damaged_rows_are_counted_or_refused(tmp_path: Path) -> None:
    ended = outcomes(lambda seed: look(write_damaged(tmp_path, seed)), range(150))
    assert ended["ok"] > 50, ended


@pytest.mark.timeout(600)
def test_damaged_tables_are_counted_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes(lambda seed: look(write_damaged_table(tmp_path, seed)), range(30))


def parsed(folder: Path, row: Any, **options: Any) -> str:
    """What a row of another trainer is read as, or the one line that refuses it."""
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    said = ""
    try:
        rows = Rows.open(Dataset(path=str(file), **options))
        read = rows.read(0, needs_answer=False)
    except (ConfigError, DataError) as error:
        said = str(error)
    if said:
        assert said.startswith((str(file), "columns.")), said
        assert "\n" not in said, said
        return "refused"
    assert texts_of(read), "a row that is read has text"
    return rows.format


@pytest.mark.timeout(600)
def test_damaged_rows_of_other_trainers_are_read_or_refused_by_their_place(tmp_path: Path) -> None:
    assert [parsed(tmp_path, row) for row in FOREIGN].count("refused") == 0
    ended: Counter[str] = Counter()
    for seed in range(600):
        damage = Damage(seed)
        row = damage.tree(damage.random.choice(FOREIGN))
        names = list(row) if isinstance(row, dict) else []
        options = {}
        if names and damage.random.random() < 0.3:
            options = {"columns": {damage.random.choice(COLUMNS): damage.random.choice(names) or "a"}}
        if damage.random.random() < 0.3:
            options["format"] = damage.random.choice(RowFormat.__args__)
        try:
            dataset = Dataset(path="x", **options)
        except ValidationError:
            continue  # a name of nothing
        ended[parsed(tmp_path, row, **dataset.model_dump(include=set(options)))] += 1
    assert ended["refused"] > 100, ended
    assert len(ended) > 5, ended


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousands_of_damaged_rows_are_counted_or_refused(tmp_path: Path) -> None:
    outcomes(lambda seed: look(write_damaged(tmp_path, seed)), range(1000, 4000))
    outcomes(lambda seed: look(write_damaged_table(tmp_path, seed)), range(1000, 1500))
