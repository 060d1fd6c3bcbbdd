"""Where rows come from: CSV, patterns, lists, URLs and slices, and the place of every row in its file."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import time
from pathlib import Path

import datasets
import fsspec
import pytest
from web_server import served as served

from configs.prompts import Dataset
from trainer.data import remote_files
from trainer.data.raw_rows import RawRows
from trainer.data.row_files import open_raw_rows
from trainer.errors import BadRow, ConfigError, DataError


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, num: int, *, first: int = 0) -> Path:
    """Rows with the texts "0", "1", ..., in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": str(number)} for number in range(first, first + num)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.suffix:
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        case ".csv":
            path.write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case _:
            path.write_text(lines)
    return path


def opened(*paths: object, **options: object) -> RawRows:
    written = [str(path) for path in paths]
    return open_raw_rows(Dataset(path=written[0] if len(written) == 1 else tuple(written), **options))


def texts(rows: RawRows) -> list[int]:
    return [int(rows.raw(row)["text"]) for row in range(len(rows))]


def origins(rows: RawRows, folder: Path) -> list[str]:
    return [rows.origin(row).removeprefix(f"{folder}/") for row in range(len(rows))]


CELLS = [
    ["plain", "a, b", 'she said "no"', "two\nlines", "", "NA"],
    ["é\u2028", " spaces ", "007", "null", '"', "\r\n"],
    ["1e5", "True", ",", '""', "'", "a\tb"],
]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "A.CSV", "a.csv.gz", "a.tsv.xz"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
def test_cells_are_read_as_the_csv_module_wrote_them(tmp_path: Path, name: str, line_end: str, mark: str) -> None:
    columns = [f"c{number}" for number in range(6)]
    plain = tmp_path / ("plain.tsv" if "tsv" in name else "plain.csv")
    with plain.open("w", newline="", encoding=mark) as file:
        writer = csv.writer(file, delimiter="\t" if "tsv" in name else ",", lineterminator=line_end)
        writer.writerows([columns, *CELLS])
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(packed(plain.read_bytes()))
    rows = opened(tmp_path / name)
    expected = [{column: cell for column, cell in zip(columns, row, strict=True) if cell} for row in CELLS]
    assert [dict(rows.raw(row)) for row in range(3)] == expected
    assert origins(rows, tmp_path) == [f"{name}:{line}" for line in (2, 4, 6)], "cells go over lines 2 and 4"


def test_pandas_reads_the_same_csv(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(CELLS, columns=[f"c{number}" for number in range(6)])
    table.to_csv(tmp_path / "a.csv")  # with its column of row numbers, which has no name
    back = pandas.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False, index_col=0)
    rows = opened(tmp_path / "a.csv")
    assert [{key: cell for key, cell in row.items() if cell} for row in back.to_dict("records")] == [
        dict(rows.raw(row)) for row in range(3)
    ]


@pytest.mark.parametrize(
    ("content", "row", "message"),
    [
        (b"a,b\n1,2\n3\n5,6\n", 1, r"x.csv:3: has 1 cell, and the header has 2 \(a, b\); put a cell that holds commas"),
        (b"a,b\n1,2\n3,4,5\n5,6\n", 1, r"x.csv:3: has 3 cells, and the header has 2"),
        (b'a,b\n1,2\n"3" no,4\n5,6\n', 1, r"x.csv:3: not CSV: text follows the closing double quote of a cell"),
        (
            b'a,b\n1,"2\n\n2"\n3,\xe9\n5,6\n',
            1,
            r"x.csv:5: not UTF-8: byte 0xE9 at byte 3 of the line",
        ),
        (b"a,b\n1,2\n3,4\r4\n5,6\n", 1, r"x.csv:3: not CSV: holds a lone carriage return"),
    ],
)
def test_a_broken_line_of_csv_is_named_and_the_others_stay_readable(
    tmp_path: Path, content: bytes, row: int, message: str
) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    rows = opened(tmp_path / "x.csv")
    with pytest.raises(BadRow, match=message):
        rows.raw(row)
    assert len(rows) == 3
    assert rows.raw(2) == {"a": "5", "b": "6"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'a,b\n1,2\n3,"4\n5,6\n',
            r"x.csv:3: a cell begins in this line, and none closes it until the end",
        ),
        (
            b'a,b\n1,2\n3,"' + (b"4" * 1023 + b"\n") * 17 * 2**10,
            r"x.csv:3: a cell begins .* more than 16 MB \(is it never closed\?\)",
        ),
        (b"a;b\n1;2\n", r"x.csv:1: the header is one column, 'a;b', .* separated by semicolons: save .* with commas"),
        (b"a\tb\n1\t2\n", r"separated by tabs: save the file with commas, or call the file .tsv"),
        (b"a,b,a\n1,2,3\n", r"x.csv:1: the header names the column 'a' twice"),
        (b"\xff\xfea\0\n\0", r"is UTF-16 text: save it as UTF-8"),
        (b"a,b\n", "has no rows"),
        (b"\n\n", "has no rows"),
        (b"a\xe9,b\n1,2\n", r"x.csv:1: not UTF-8"),
    ],
)
def test_a_csv_file_that_cannot_be_cut_into_rows_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "x.csv")


def test_a_pattern_is_its_files_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b.jsonl", 2, first=10)
    write(tmp_path / "a.jsonl", 2)
    write(tmp_path / "deep/er/c.jsonl", 1, first=20)
    write(tmp_path / "note.md", 1)
    rows = opened(tmp_path / "*.jsonl")
    assert texts(rows) == [0, 1, 10, 11]
    assert origins(rows, tmp_path) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]
    assert texts(opened(tmp_path / "**/*.jsonl")) == [0, 1, 10, 11, 20]
    assert texts(opened(tmp_path / "[b]*.jsonl", max_rows=1)) == [10]
    monkeypatch.chdir(tmp_path)
    assert origins(opened("?.jsonl"), tmp_path)[0] == "a.jsonl:1", "as it was written"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.csv", r"the pattern .*\*.csv matches no file \(.* holds a.jsonl, folder\)"),
        ("nowhere/*.csv", "matches no file .*there is no folder .*nowhere"),
        ("f*", r"matches only folders, such as .*folder: write .*f\*/\*.jsonl"),
        ("a.jsnl", "does not exist .*did you mean 'a.jsonl'"),
    ],
)
def test_a_pattern_or_path_that_leads_nowhere_says_what_is_there(tmp_path: Path, pattern: str, message: str) -> None:
    write(tmp_path / "a.jsonl", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / pattern)


def test_a_list_of_any_kinds_is_one_dataset_and_each_row_keeps_its_place(tmp_path: Path) -> None:
    names = ["c.jsonl", "b.parquet", "a.csv", "d.json"]
    files = [write(tmp_path / name, 2, first=10 * number) for number, name in enumerate(names)]
    write(tmp_path / "folder/train.jsonl", 1, first=90)
    rows = opened(*files, tmp_path / "folder", tmp_path / "[c]*.jsonl")
    assert texts(rows) == [0, 1, 10, 11, 20, 21, 30, 31, 90, 0, 1]
    assert origins(rows, tmp_path)[:6] == [
        *("c.jsonl:1", "c.jsonl:2"),
        *("b.parquet[row 0]", "b.parquet[row 1]"),
        *("a.csv:2", "a.csv:3"),
    ]
    assert texts(opened(*files, max_rows=3)) == [0, 1, 10]
    with pytest.raises(ConfigError, match=r"missing.jsonl does not exist"):
        opened(*files, tmp_path / "missing.jsonl")


SLICES = ["train", "train[90%:]", "train[3:7]", "train[-5%:]", "train[:-60%]", "train[:20%]+train[-2:]"]
KINDS = ["a.jsonl", "a.csv", "a.parquet", "a.json", "folder", "saved"]


@pytest.mark.parametrize(
    ("name", "split"), [*(("a.jsonl", split) for split in SLICES), *((kind, "train[:90%]") for kind in KINDS)]
)
def test_a_slice_takes_what_datasets_takes_and_rows_keep_their_places(tmp_path: Path, name: str, split: str) -> None:
    path = tmp_path / name
    if name == "folder":
        write(path / "train.jsonl", 37)
    elif name == "saved":
        datasets.Dataset.from_list([{"text": str(n)} for n in range(37)]).save_to_disk(path)
    else:
        write(path, 37)
    oracle = write(tmp_path / "oracle.jsonl", 37)
    cache = str(tmp_path / "oracle")
    expected = datasets.load_dataset("json", data_files=str(oracle), split=split, cache_dir=cache)["text"]
    rows = opened(path, split=split)
    assert texts(rows) == [int(text) for text in expected]
    first = int(expected[0])
    assert rows.origin(0) == {
        "a.jsonl": f"{path}:{first + 1}",
        "a.csv": f"{path}:{first + 2}",
    }.get(name, f"{path}[row {first}]")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[30:20]", r"the split train\[30:20\] holds none of its 20 rows"),
        ("train[:1%]", r"the split train\[:1%\] holds none of its 20 rows"),
        ("test", "is one file without splits: remove split: test"),
        ("trian[:5]", "is one file without splits: write train for trian in split"),
    ],
)
def test_a_split_that_holds_nothing_is_refused(tmp_path: Path, split: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(write(tmp_path / "a.jsonl", 20), split=split)


def test_an_unknown_split_of_a_folder_is_told_the_nearest(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write(tmp_path / f"folder/{name}.jsonl", 10)
    with pytest.raises(ConfigError, match="did you mean 'validation'"):
        opened(tmp_path / "folder", split="validatoin[:50%]")
    assert len(opened(tmp_path / "folder", split="train[:50%]+validation[:10%]")) == 6


@pytest.mark.parametrize("split", ["", "train[5", "train[:101%]", "train[::2]", "train+", "a b", "train[50%]"])
def test_what_is_no_split_is_refused_by_the_configuration(split: str) -> None:
    with pytest.raises(ValueError, match=r"is no split: write a name \(train\)"):
        Dataset(path="a.jsonl", split=split)


def test_rows_are_read_from_a_web_server_and_again_when_they_change(served: tuple[str, Path]) -> None:
    url, folder = served
    write(folder / "a.jsonl", 3)
    write(folder / "b.parquet", 2, first=10)
    (folder / "c.csv.gz").write_bytes(gzip.compress(b"text\n7\n8\n"))
    rows = opened(f"{url}/a.jsonl?download=true", f"{url}/b.parquet", f"{url}/c.csv.gz")
    assert texts(rows) == [0, 1, 2, 10, 11, 7, 8]
    assert rows.origin(1) == f"{url}/a.jsonl?download=true:2"
    assert rows.origin(6) == f"{url}/c.csv.gz:3"
    assert texts(opened(f"{url}/a.jsonl", split="train[1:]")) == [1, 2]
    write(folder / "a.jsonl", 4)
    assert texts(opened(f"{url}/a.jsonl")) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere.jsonl", "does not exist: the server has no such file"),
        ("/secret.jsonl", "cannot read the dataset .*secret.jsonl: .*403.*; are credentials needed"),
        ("/silent.jsonl", "silent.jsonl.*can this machine reach it"),
    ],
)
def test_what_a_server_does_not_give_is_one_bounded_error(
    served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setattr(remote_files, "SILENCE_S", 1)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        opened(served[0] + path)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/rows.jsonl", r"cannot read the dataset .*127.0.0.1:9.*can this machine reach it"),
        ("s3://bucket/rows.jsonl", "s3:// needs a package that is not installed: pip install s3fs"),
        ("gs://bucket/rows.jsonl", "pip install gcsfs"),
        ("htps://host/rows.jsonl", "there is no protocol htps://; did you mean 'https'"),
        ("zip://rows.jsonl::https://host/a.zip", "URLs inside of others are not read"),
        ("memory://rows/nowhere.jsonl", "does not exist"),
        ("memory://rows/*.csv", r"the pattern memory://rows/\*.csv matches no file"),
        ("memory://rows", r"is a folder: name its files, such as memory://rows/\*.jsonl"),
    ],
)
def test_a_url_that_cannot_be_read_says_why(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fsspec.filesystem("memory").pipe("/rows/a.jsonl", b'{"text": "1"}\n')
    with pytest.raises(ConfigError, match=message):
        opened(url)


def test_patterns_of_urls_and_files_by_their_url_are_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/many/b.jsonl", b'{"text": "2"}\n')
    memory.pipe("/many/a.jsonl", b'{"text": "1"}\n')
    assert texts(opened("memory://many/*.jsonl")) == [1, 2]
    assert texts(opened(f"file://{write(tmp_path / 'a.jsonl', 2)}")) == [0, 1]
    with pytest.raises(ConfigError, match="is a URL, which says its revision itself: remove revision: main"):
        opened("memory://many/*.jsonl", revision="main")
