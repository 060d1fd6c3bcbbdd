"""Rows that `datasets` loads: files of tables, folders, data sets of the hub."""

from __future__ import annotations

import glob
import re
from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from configs.paths import refuse_pattern
from configs.refusal import did_you_mean
from trainer.data.cache import cache_for
from trainer.data.content import files_below
from trainer.data.struct_nulls import without_struct_nulls
from trainer.errors import BadRow, ConfigError, DataError, foreign_errors, reason_of

MAX_ROW_CHARACTERS = 16 * 2**20

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json"}


class Table:
    """A dataset that `datasets` loaded (memory-mapped arrow)."""

    def __init__(self, name: str, table: Any) -> None:
        self.name = name
        self._table = table
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
            value = without_struct_nulls(self._table[row], self._table.features)
        length = num_characters(value)
        if length > MAX_ROW_CHARACTERS:
            millions = length / 2**20
            raise BadRow(
                origin,
                f"the row has {millions:.0f} M characters, the limit is {MAX_ROW_CHARACTERS // 2**20} M: split it",
            )
        return value


def num_characters(value: Any) -> int:
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


def open_table_file(path: Path, suffix: str, *, name: str) -> Table:
    """A parquet, arrow or json file, if compressed. Raises `DataError` for one that cannot be read."""
    if "::" in str(path.absolute()):
        raise ConfigError(
            f"the dataset {path.absolute()}: the library that reads it cannot read names with ::; rename it"
        )
    with foreign_errors(f"cannot read the dataset {name}", error=DataError):
        cache = cache_for({path.name: path})
    if suffix == ".arrow":
        _validate_arrow(path, name)
    literal = glob.escape(str(path.absolute()))  # `datasets` takes a file's name for a pattern of names
    return Table(name, load(name, BUILDERS[suffix], split="train", data_files=literal, cache_dir=str(cache)))


def _validate_arrow(path: Path, name: str) -> None:
    """Raises `DataError` for a damaged file: `datasets` does not check it, and damaged offsets crash the process."""
    import pyarrow

    with (
        foreign_errors(f"cannot read the dataset {name}", error=DataError),
        pyarrow.memory_map(str(path)) as file,
    ):
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        for batch in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
            batch.validate(full=True)


def open_folder(path: Path, split: str, *, name: str) -> Table:
    """A folder of files, or one of `save_to_disk`."""
    if not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
        refuse_pattern(f"the dataset folder {name}", path, reader="the library that reads it")
        with foreign_errors(f"cannot read the dataset {name}", error=DataError):
            cache = cache_for(files_below(path))
        return Table(name, load(name, str(path.absolute()), split=split, cache_dir=str(cache)))
    import datasets

    hint = "save it again with save_to_disk"
    with foreign_errors(f"cannot read the dataset {name}", error=DataError, hint=hint):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        if split not in ("train", str(loaded.split)):
            raise ConfigError(f"{name} is one table without splits: remove split: {split}")
        return Table(name, loaded)
    if split not in loaded:
        raise ConfigError(f"{name} has no split {split}: write one of {', '.join(loaded)}{did_you_mean(split, loaded)}")
    return Table(name, loaded[split])


def load(name: str, builder: str, *, split: str, **options: Any) -> Any:
    """What `datasets` reads. Raises `ConfigError` for what does not exist, `DataError` for what cannot be read."""
    import datasets

    with foreign_errors(f"cannot read the dataset {name} (split {split})", error=DataError):
        try:
            return datasets.load_dataset(builder, split=split, **options)
        except (FileNotFoundError, ConnectionError) as error:
            raise ConfigError(
                f"cannot find the dataset {name}: it is no file or folder here, and the hub answers: {error}"
            ) from error
        except datasets.exceptions.DatasetsError as error:
            reason = reason_of(error.__cause__ or error)
            raise DataError(f"cannot read the dataset {name}: {reason}") from error
        except StopIteration as error:
            raise DataError(f"the dataset {name} has no rows") from error
        except (OSError, ValueError, TypeError) as error:
            if "corresponds to no data" in str(error):
                raise DataError(f"the dataset {name} has no rows") from error
            kind = ConfigError if "split" in str(error) or "Config name" in str(error) else DataError
            hint = _other_split(split, str(error))
            raise kind(f"cannot read the dataset {name} (split {split}): {reason_of(error)}{hint}") from error


def _other_split(split: str, message: str) -> str:
    known = re.search(r"Should be one of \[(.*)\]", message)
    return did_you_mean(split, re.findall(r"'([^']*)'", known[1])) if known else ""
