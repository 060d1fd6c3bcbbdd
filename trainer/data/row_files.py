"""The rows of a dataset by number, with the place of each for messages: lines of a jsonl file (`json_lines.py`), or a
table that `datasets` loads."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from configs.paths import expand_home, refuse_pattern
from configs.prompts import Dataset
from configs.section import HUB_NAME
from trainer.data.content import files_below, folder_content
from trainer.data.json_lines import BOM, JsonLines
from trainer.errors import BadRow, ConfigError, DataError, foreign_errors, reason_of

MAX_ROW_CHARACTERS = 16 * 2**20

WHOLE_BYTES, PLACES = 256 * 2**20, 1024
"""How much of row files is read to tell whether they are the same (`trainer/data/content.py`)."""

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}


class RawRows(Protocol):
    """Rows by number, not yet validated."""

    name: str

    def __len__(self) -> int: ...

    def origin(self, row: int) -> str: ...

    def raw(self, row: int) -> Mapping[str, Any]:
        """Raises `BadRow` where the row cannot even be decoded."""
        ...


def open_raw_rows(dataset: Dataset) -> RawRows:
    """The rows of a configured dataset, none of them loaded yet.

    Raises `ConfigError` for a path, split or hub name that does not exist, `DataError` for a file that cannot be read
    or has no rows.
    """
    with foreign_errors(f"cannot look at the dataset {dataset.path!r}"):
        path = expand_home(dataset.path)
        is_file, is_folder, exists = path.is_file(), path.is_dir(), path.exists()
    if (is_file or is_folder) and dataset.revision is not None:
        raise ConfigError(
            f"the dataset {dataset.path} lies here and has no revisions: remove revision: {dataset.revision}"
        )
    if is_file:
        rows = _open_file(path, dataset)
    elif is_folder:
        rows = Table(dataset.path, _load_folder(path, dataset), dataset.max_rows)
    elif exists:
        raise ConfigError(f"the dataset {dataset.path} is neither a file nor a folder")
    elif _looks_local(dataset.path):
        raise ConfigError(f"the dataset {dataset.path} does not exist (looked for {path.absolute()})")
    else:
        rows = Table(dataset.path, _load(dataset, dataset.path, revision=dataset.revision), dataset.max_rows)
    if not len(rows):
        raise DataError(f"the dataset {dataset.path} has no rows")
    return rows


class Table:
    """A dataset that `datasets` loaded (memory-mapped arrow)."""

    def __init__(self, name: str, table: Any, max_rows: int | None = None) -> None:
        self.name = name
        self._table = table if max_rows is None or max_rows >= len(table) else table.select(range(max_rows))
        self._batches = self._table.data.table.to_batches()
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self._validated: set[int] = set()

    def __len__(self) -> int:
        return len(self._table)

    def origin(self, row: int) -> str:
        return f"{self.name}[row {row}]"

    def raw(self, row: int) -> Mapping[str, Any]:
        origin = self.origin(row)
        batch = bisect_right(self._ends, row)
        with foreign_errors("cannot be read", error=partial(BadRow, origin)):
            if batch not in self._validated:  # damaged offsets would end the process, not raise
                self._batches[batch].validate(full=True)
                self._validated.add(batch)
            value = self._table[row]
        num_characters = _num_characters(value)
        if num_characters > MAX_ROW_CHARACTERS:
            millions = num_characters / 2**20
            raise BadRow(
                origin,
                f"the row has {millions:.0f} M characters, the limit is {MAX_ROW_CHARACTERS // 2**20} M: split it",
            )
        return value


def _num_characters(value: Any) -> int:
    """Of all texts in a row."""
    found, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (str, bytes)):
            found += len(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return found


def _open_file(path: Path, dataset: Dataset) -> RawRows:
    if path.stat().st_size == 0:
        raise DataError(f"the dataset {dataset.path} has no rows: the file is empty")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and not _is_array(path)):
        if dataset.split != "train":
            raise ConfigError(f"{dataset.path} is one file without splits: remove split: {dataset.split}")
        return JsonLines(path, dataset.max_rows)
    if suffix in (".gz", ".zst", ".bz2", ".xz") and len(suffixes) > 1:
        suffix = suffixes[-2]
    if suffix not in _BUILDERS:
        raise ConfigError(
            f"cannot tell the format of {dataset.path} from its name: use .jsonl, .json, .parquet or .arrow"
        )
    if "::" in str(path.absolute()):
        raise ConfigError(
            f"the dataset {path.absolute()}: the library that reads it cannot read names with ::; rename it"
        )
    with foreign_errors(f"cannot read the dataset {dataset.path}", error=DataError):
        cache = _cache_for({path.name: path})
    if suffix == ".arrow":
        _validate_arrow(path, dataset)
    literal = glob.escape(str(path.absolute()))  # `datasets` takes a file's name for a pattern of names
    table = _load(dataset, _BUILDERS[suffix], data_files=literal, cache_dir=cache)
    return Table(dataset.path, table, dataset.max_rows)


def _validate_arrow(path: Path, dataset: Dataset) -> None:
    """Raises `DataError` for a damaged file: `datasets` does not check it, and damaged offsets crash the process."""
    import pyarrow

    with (
        foreign_errors(f"cannot read the dataset {dataset.path}", error=DataError),
        pyarrow.memory_map(str(path)) as file,
    ):
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        for batch in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
            batch.validate(full=True)


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(BOM).lstrip().startswith(b"[")


def _load_folder(path: Path, dataset: Dataset) -> Any:
    if not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
        refuse_pattern(f"the dataset folder {dataset.path}", path, reader="the library that reads it")
        with foreign_errors(f"cannot read the dataset {dataset.path}", error=DataError):
            cache = _cache_for(files_below(path))
        return _load(dataset, str(path.absolute()), cache_dir=cache)
    import datasets

    hint = "save it again with save_to_disk"
    with foreign_errors(f"cannot read the dataset {dataset.path}", error=DataError, hint=hint):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        if dataset.split not in ("train", str(loaded.split)):
            raise ConfigError(f"{dataset.path} is one table without splits: remove split: {dataset.split}")
        return loaded
    if dataset.split not in loaded:
        raise ConfigError(f"{dataset.path} has no split {dataset.split}: write one of {', '.join(loaded)}")
    return loaded[dataset.split]


def _cache_for(files: Mapping[str, Path]) -> str:
    """A cache folder of `datasets` for the present content of files. Its own cache key is the time of modification,
    which a copy or an unpacked archive may keep although the rows differ."""
    import datasets

    content = folder_content(files, whole_bytes=WHOLE_BYTES, places=PLACES)
    changed = {name: path.stat().st_ctime_ns for name, path in files.items()}  # set by every write, not by its author
    key = hashlib.sha256(json.dumps([content, changed], sort_keys=True).encode()).hexdigest()[:16]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "stillhouse" / key)


def _load(dataset: Dataset, builder: str, **options: Any) -> Any:
    import datasets

    with foreign_errors(f"cannot read the dataset {dataset.path} (split {dataset.split})", error=DataError):
        try:
            return datasets.load_dataset(builder, split=dataset.split, **options)
        except (FileNotFoundError, ConnectionError) as error:
            raise ConfigError(
                f"cannot find the dataset {dataset.path}: it is no file or folder here, and the hub answers: {error}"
            ) from error
        except datasets.exceptions.DatasetsError as error:
            reason = reason_of(error.__cause__ or error)
            raise DataError(f"cannot read the dataset {dataset.path}: {reason}") from error
        except StopIteration as error:
            raise DataError(f"the dataset {dataset.path} has no rows") from error
        except (OSError, ValueError, TypeError) as error:
            if "corresponds to no data" in str(error):
                raise DataError(f"the dataset {dataset.path} has no rows") from error
            kind = ConfigError if "split" in str(error) or "Config name" in str(error) else DataError
            raise kind(f"cannot read the dataset {dataset.path} (split {dataset.split}): {reason_of(error)}") from error


def _looks_local(path: str) -> bool:
    """Hub names are `name` or `owner/name`; everything else was meant as a path."""
    known_suffix = Path(path).suffix.lower() in (*_BUILDERS, ".ndjson")
    return known_suffix or not re.fullmatch(HUB_NAME, path)
