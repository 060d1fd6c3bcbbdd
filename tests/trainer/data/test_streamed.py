"""Streams: every row once an epoch, exact continuation without reading what lies before, and servers that break off."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import asdict
from pathlib import Path

import datasets
import fsspec
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from prompt_streams import BAD, open_stream, same, talk
from pydantic import TypeAdapter
from web_server import served as served

from configs.prompts import Dataset
from trainer.data import stream_files as files
from trainer.data import streamed
from trainer.data.prompts import PromptStream
from trainer.data.rows import Rows
from trainer.errors import ConfigError, DataError, InfrastructureError
from trainer.types import Cursor

KINDS = ["jsonl", "csv", "parquet", "jsonl.gz"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(streamed, "BLOCK_ROWS", 7)
    monkeypatch.setattr(streamed, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(files, "PARQUET_ROWS", 4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def row(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}?", "completion": f' "answer",\n{number}'}


def write(path: Path, numbers: range, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row(number) for number in numbers]
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    match kind:
        case "jsonl":
            path.write_text(lines, encoding="utf-8-sig")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "csv":
            cells = (f'{one["prompt"]},"{one["completion"].replace(chr(34), chr(34) * 2)}"\n' for one in rows)
            path.write_text("prompt,completion\n" + "".join(cells))
        case "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path, batch_size=5)


def stream_of(folder: Path, kind: str, *, sizes: tuple[int, ...] = (11, 3, 16), **options: object) -> PromptStream:
    """A stream of files of these sizes, with rows 0, 1, ... in the order of their names."""
    first = 0
    for number, size in enumerate(sizes):
        if not (folder / f"{number}.{kind}").exists():
            write(folder / f"{number}.{kind}", range(first, first + size), kind)
        first += size
    return open_stream(Dataset(path=f"{folder}/*.{kind}", streaming=True), **options)


def numbers(prompts: list) -> list[int]:
    """Of the rows, by where they lie."""
    return sorted(int(prompt.id.split(":")[1]) for prompt in prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_holds_every_row_once_in_another_order(tmp_path: Path, kind: str) -> None:
    stream = stream_of(tmp_path, kind)
    assert stream.rows_per_epoch is None
    whole = open_stream(Dataset(path=f"{tmp_path}/*.{kind}"), shuffle=False).take(30)
    expected = sorted(prompt.token_ids.tolist() for prompt in whole)
    epochs = [stream.take(30) for _ in range(3)]
    for number, prompts in enumerate(epochs):
        assert sorted(prompt.token_ids.tolist() for prompt in prompts) == expected
        assert {prompt.id.split(":")[0] for prompt in prompts} == {str(number)}
        assert numbers(prompts) == list(range(30))
    orders = [[prompt.origin for prompt in prompts] for prompts in epochs]
    assert orders[0] != orders[1] != orders[2]
    places = {prompt.token_ids.tobytes(): prompt.origin for prompt in whole}
    assert all(places[prompt.token_ids.tobytes()] == prompt.origin for prompt in epochs[0]), "each keeps its place"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_from_every_position_as_if_it_had_never_stopped(tmp_path: Path, kind: str) -> None:
    whole = stream_of(tmp_path, kind)
    expected = [whole.take(1) for _ in range(70)]
    for stop in range(70):
        before = stream_of(tmp_path, kind)
        before.take(stop)
        written = json.dumps(asdict(before.cursor))  # as a checkpoint holds it
        after = stream_of(tmp_path, kind)
        after.seek(TypeAdapter(Cursor).validate_json(written))
        assert same([prompt for one in expected[stop : stop + 9] for prompt in one], after.take(min(9, 70 - stop)))


def test_without_shuffling_rows_come_as_they_lie(tmp_path: Path) -> None:
    prompts = stream_of(tmp_path, "jsonl", shuffle=False).take(31)
    assert [prompt.id for prompt in prompts] == [*(f"0:{number}" for number in range(30)), "1:0"]
    assert prompts[11].origin == f"{tmp_path}/1.jsonl:1"


def test_blocks_end_by_their_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 150)
    rows = streamed.StreamedRows("a", files.stream_files(_dataset(tmp_path, range(30))))
    sizes = [len(rows.block.rows)]
    while rows.block.follows is not None:
        sizes.append(len(rows.load(rows.block.follows).rows))
    assert sum(sizes) == 30
    assert max(sizes) == 3, "the row that reaches the limit is the last one of its block"


def _dataset(folder: Path, numbers: range) -> Dataset:
    write(folder / "a.jsonl", numbers, "jsonl")
    return Dataset(path=str(folder / "a.jsonl"), streaming=True)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_what_lies_before_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    sizes = (5, 400, 5)
    stream = stream_of(tmp_path, kind, sizes=sizes, shuffle=False)
    stream.take(380)
    read: list[str] = []
    rows_from = files.StreamFile.rows_from

    def counted(*given: object):
        for one in rows_from(*given):
            read.append(one.origin)
            yield one

    after = stream_of(tmp_path, kind, sizes=sizes, shuffle=False)
    monkeypatch.setattr(files.StreamFile, "rows_from", counted)
    after.seek(stream.cursor)
    (prompt,) = after.take(1)
    assert prompt.id == "0:380"
    assert len(read) <= 8, "its block and one more"


def test_a_folder_is_streamed_by_the_files_of_its_split(tmp_path: Path) -> None:
    write(tmp_path / "folder/train.jsonl", range(5), "jsonl")
    write(tmp_path / "folder/test.jsonl", range(5, 7), "jsonl")
    for split, expected in (("train", 5), ("test", 2)):
        stream = open_stream(Dataset(path=str(tmp_path / "folder"), streaming=True, split=split))
        assert {prompt.id.split(":")[0] for prompt in stream.take(expected)} == {"0"}
        assert stream.take(1)[0].id.startswith("1:")
    with pytest.raises(ConfigError, match=r"has no files of a split other \(there are: train, test"):
        open_stream(Dataset(path=str(tmp_path / "folder"), streaming=True, split="other"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [".", "ranges"])
def test_a_server_is_streamed_from_and_continued(served: tuple[str, Path], place: str, kind: str) -> None:
    url, folder = served
    write(folder / place / f"a.{kind}", range(20), kind)
    dataset = Dataset(path=f"{url}/{place}/a.{kind}".replace("/./", "/"), streaming=True)
    if kind == "parquet" and place != "ranges":
        with pytest.raises(ConfigError, match="its server gives no parts of a file, which parquet is read by"):
            open_stream(dataset)
        return
    whole = open_stream(dataset)
    expected = [whole.take(1)[0] for _ in range(25)]
    stopped = open_stream(dataset)
    stopped.take(12)
    after = open_stream(dataset)
    after.seek(stopped.cursor)
    assert same(expected[12:], after.take(13))


class BreakingFile(io.BytesIO):
    """Gives some bytes, and then breaks off, so many times in all."""

    left = 0

    def readinto(self, buffer: bytearray) -> int:
        if self.tell() > 300 and BreakingFile.left > 0:
            BreakingFile.left -= 1
            raise OSError("connection reset by peer")
        return super().readinto(memoryview(buffer)[:200])


class Breaking(MemoryFileSystem):
    protocol = "breaking"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("breaking://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: object) -> BreakingFile:
        return BreakingFile(super()._open(path, mode, **options).read())


def test_a_server_that_breaks_off_is_asked_again_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(30)).encode()
    fsspec.filesystem("memory").pipe("/broken/a.jsonl", lines)
    whole = open_stream(Dataset(path="memory://broken/a.jsonl", streaming=True)).take(30)
    broken = open_stream(Dataset(path="breaking://broken/a.jsonl", streaming=True))
    monkeypatch.setattr(BreakingFile, "left", 2)
    assert [prompt.id for prompt in broken.take(30)] == [prompt.id for prompt in whole]
    assert BreakingFile.left == 0
    again = open_stream(Dataset(path="breaking://broken/a.jsonl", streaming=True))
    monkeypatch.setattr(BreakingFile, "left", 99)
    with pytest.raises(InfrastructureError, match=r"a.jsonl broke off 3 times: connection reset by peer"):
        again.take(30)


def test_bad_rows_of_a_stream_are_named_and_left_out_and_damaged_files_end_it(tmp_path: Path) -> None:
    lines = [json.dumps(talk(number)) for number in range(8)] + [json.dumps(BAD), "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    dataset = Dataset(path=str(tmp_path / "a.jsonl"), streaming=True)
    with pytest.raises(DataError, match=r"a.jsonl:(9|10): "):
        open_stream(dataset).take(10)
    stream = open_stream(dataset, on_bad_row="skip", quarantine=tmp_path / "rejected.jsonl")
    assert len(stream.take(20)) == 16
    assert stream.counters.rejected == 4
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DataError, match=r"cannot read the dataset .*a.parquet"):
        open_stream(Dataset(path=str(tmp_path / "a.parquet"), streaming=True))


def call(name: str, **arguments: object) -> dict[str, object]:
    called = {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
    return {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [called]}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
    }


def test_a_stream_of_a_table_says_what_the_table_says(tmp_path: Path) -> None:
    """Arrow gives every call the arguments of all others, as null, and writes columns of any JSON as text."""
    rows = [call("rain", city="Bern", day=None), call("add", left="1", right="2")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "calls.parquet")
    features = datasets.Features({"conversations": datasets.Json(), "system": datasets.Value("string")})
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": None}]
    datasets.Dataset.from_list(
        [{"conversations": turns, "system": None}, {"conversations": turns, "system": "c"}], features=features
    ).to_parquet(tmp_path / "json.parquet")
    for name in ("calls.parquet", "json.parquet"):
        streamed_rows, whole = (
            Rows.open(Dataset(path=str(tmp_path / name), streaming=streaming)) for streaming in (True, False)
        )
        for number in range(2):
            assert streamed_rows.raw.raw(number) == whole.raw.raw(number)
            assert streamed_rows.read(number, needs_answer=True) == whole.read(number, needs_answer=True)
    first = Rows.open(Dataset(path=str(tmp_path / "calls.parquet"), streaming=True)).read(0, needs_answer=True)
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}


def test_a_stream_of_nothing_but_bad_rows_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.data import prompts

    monkeypatch.setattr(prompts, "MOST_UNUSABLE", 20)
    (tmp_path / "a.jsonl").write_text(json.dumps(talk(0)) + "\n" + (json.dumps(BAD) + "\n") * 30)
    stream = open_stream(Dataset(path=str(tmp_path / "a.jsonl"), streaming=True), on_bad_row="skip", shuffle=False)
    with pytest.raises(DataError, match=r"0 of 20 rows of the dataset .*a.jsonl are usable; for example .*a.jsonl:2"):
        stream.take(31)


@pytest.mark.parametrize("name", ["a.json", "a.arrow", "a.txt"])
def test_what_cannot_be_read_in_pieces_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[]")
    with pytest.raises(ConfigError, match=rf"{name} cannot be streamed, which .jsonl, .csv, .tsv and .parquet"):
        open_stream(Dataset(path=str(tmp_path / name), streaming=True))
