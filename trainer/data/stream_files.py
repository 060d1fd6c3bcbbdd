"""The files of a streamed dataset, read from any place on: what they hold, row by row, and where each row begins.

    local file, pattern, URL  -> itself, whatever fsspec reads
    folder, hub name          -> the files of a split, as `datasets` finds them

Only what can be read in pieces is streamed: JSON lines, CSV, TSV and parquet. A plain text file is continued at its
byte and a parquet file at its row group; of a compressed one, and of a server that knows no ranges, what lies before is
read again.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from configs.paths import expand_home, is_url
from configs.prompts import Dataset
from trainer.data.csv_lines import SEPARATORS, CsvLines
from trainer.data.json_lines import LINES, JsonLines
from trainer.data.local_files import local_files
from trainer.data.remote_files import asking, expand_url, file_system, name_in_url
from trainer.data.struct_nulls import without_struct_nulls
from trainer.data.tables import num_characters
from trainer.data.text_files import TextFormat, check_length, check_text
from trainer.data.unpacked import PACKED, unpacker
from trainer.errors import BadRow, ConfigError, foreign_errors

PIECE_BYTES = 2**20
PARQUET_ROWS = 64  # decoded at once


@dataclass(frozen=True, slots=True)
class StreamFile:
    """A file that rows are read from one after the other."""

    path: str  # also its name in messages

    @property
    def suffixes(self) -> tuple[str, str]:
        """(of the format, of the compression or nothing), in small letters."""
        found = [suffix.lower() for suffix in Path(name_in_url(self.path) if is_url(self.path) else self.path).suffixes]
        packed = found.pop() if len(found) > 1 and found[-1] in PACKED else ""
        return (found[-1] if found else ""), packed

    def rows_from(self, offset: int = 0, line: int = 1) -> Iterator[StreamedRow]:
        """All rows from the one on that begins there."""
        with ExitStack() as stack:
            suffix, packed = self.suffixes
            if suffix == ".parquet":
                yield from _parquet_rows(self, stack, offset)
            else:
                yield from _text_rows(self, stack, suffix, packed, offset, line)


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row, not yet decoded where it is text, and where reading it begins."""

    origin: str
    offset: int  # byte of a text, unpacked; row of a parquet file
    line: int  # from 1; 1 of a parquet file
    content: bytes | Mapping[str, Any]
    layout: TextFormat | None
    size: int  # bytes of text
    features: Any = None  # `datasets.Features` of a parquet file

    def raw(self) -> Mapping[str, Any]:
        """Raises `BadRow`."""
        if self.layout is None:
            with foreign_errors("cannot be read", error=partial(BadRow, self.origin)):
                return without_struct_nulls(self.features.decode_example(self.content), self.features)
        check_length(self.size, self.origin)
        return self.layout.decode(self.content, self.origin)  # type: ignore[arg-type]


def stream_files(dataset: Dataset) -> list[StreamFile]:
    """Sorted within each path. Raises `ConfigError` for what does not exist or cannot be streamed."""
    files = [StreamFile(name) for path in dataset.paths for name in _names(dataset, path)]
    for file in files:
        suffix, packed = file.suffixes
        if suffix not in (*LINES, *SEPARATORS, ".parquet") or (packed and suffix == ".parquet"):
            raise ConfigError(
                f"{file.path} cannot be streamed, which .jsonl, .csv, .tsv and .parquet files can: remove streaming"
            )
    return files


def _names(dataset: Dataset, path: str) -> list[str]:
    if is_url(path):
        return expand_url(path)
    if files := local_files(path):
        return [str(file.path) for file in files]
    import datasets

    source = str(expand_home(path).absolute()) if expand_home(path).is_dir() else path
    with foreign_errors(f"cannot look at the dataset {path}"):
        found = datasets.load_dataset_builder(source, revision=dataset.revision).config.data_files or {}
    if dataset.split not in found:
        raise ConfigError(f"{path} has no files of a split {dataset.split} (there are: {', '.join(map(str, found))})")
    return [str(name) for name in found[dataset.split]]


def _text_rows(
    file: StreamFile, stack: ExitStack, suffix: str, packed: str, offset: int, line: int
) -> Iterator[StreamedRow]:
    content = _opened(file, packed, stack)
    layout: TextFormat = JsonLines()
    if suffix in SEPARATORS:
        layout = CsvLines.of(content, name=file.path, separator=SEPARATORS[suffix])
        content = _opened(file, packed, stack)
    elif offset == 0:
        check_text(content.read(2), file.path)
        content = _opened(file, packed, stack)
    _move_to(content, offset)
    for record in layout.records(content, offset, line):
        origin = f"{file.path}:{record.number}"
        yield StreamedRow(origin, record.start, record.number, record.content, layout, record.length)


def _parquet_rows(file: StreamFile, stack: ExitStack, offset: int) -> Iterator[StreamedRow]:
    import datasets
    import pyarrow.parquet

    content = _opened(file, "", stack, random_access=True)
    table = pyarrow.parquet.ParquetFile(content, buffer_size=PIECE_BYTES, pre_buffer=False)
    features = datasets.Features.from_arrow_schema(table.schema_arrow)
    ends = list(accumulate(table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)))
    first = bisect_right(ends, offset)
    row = ends[first - 1] if first else 0
    groups = list(range(first, table.num_row_groups))
    for batch in table.iter_batches(PARQUET_ROWS, row_groups=groups, use_threads=False) if groups else ():
        skipped = min(max(0, offset - row), batch.num_rows)
        for number, value in enumerate(batch.slice(skipped).to_pylist(), start=row + skipped):
            yield StreamedRow(f"{file.path}[row {number}]", number, 1, value, None, num_characters(value), features)
        row += batch.num_rows


def _opened(file: StreamFile, packed: str, stack: ExitStack, *, random_access: bool = False) -> BinaryIO:
    if is_url(file.path):
        content = stack.enter_context(_remote(file.path, random_access=random_access))
    else:
        content = stack.enter_context(open(file.path, "rb"))  # noqa: SIM115 - the stack closes it
    return stack.enter_context(unpacker(packed, file.path)(content, mode="rb")) if packed else content


def _remote(url: str, *, random_access: bool) -> BinaryIO:
    """Raises `ConfigError` for a server that gives no parts of a file, where parts are needed."""
    system, path = file_system(url)
    options: dict[str, Any] = {"cache_type": "none"} if random_access else {}
    with asking(url):
        if "http" in system.protocol and not _gives_parts(system, path):
            if random_access:
                raise ConfigError(
                    f"{url} cannot be streamed: its server gives no parts of a file, which parquet is read by; remove "
                    "streaming"
                )
            options = {"block_size": 0}  # from beginning to end
        content = system.open(path, "rb", **options)
    return content if random_access else io.BufferedReader(content, PIECE_BYTES)  # which knows a longest line


def _gives_parts(system: Any, path: str) -> bool:
    """Whether a web server answers a question for one byte with that byte, and not with the whole file."""
    try:
        with system.open(path, "rb", cache_type="none") as content:
            content.seek(1)
            content.read(1)
    except ValueError:
        return False
    return True


def _move_to(content: BinaryIO, offset: int) -> None:
    """By reading, where the source cannot seek."""
    if not offset:
        return
    try:
        content.seek(offset)
    except (ValueError, OSError, NotImplementedError):
        while offset > 0:
            piece = content.read(min(offset, PIECE_BYTES))
            if not piece:
                return
            offset -= len(piece)
