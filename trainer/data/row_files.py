"""The rows of a dataset by number, with the place of each for messages, whatever its paths name.

    a pattern, a list  --> each of its files, in order
    a URL              --> a local copy (`remote_files.py`)
    jsonl, csv, tsv    --> lines of a text file (`text_files.py`), unpacked first where it is compressed
    parquet, arrow, json, a folder, a hub name --> a table that `datasets` loads (`tables.py`)

Sources stand one after the other; of all of them the slices of `split` are taken, then `max_rows`. A row keeps its
place in its file.
"""

from __future__ import annotations

import re
from pathlib import Path

from configs.paths import expand_home, is_url
from configs.prompts import Dataset
from configs.refusal import did_you_mean
from configs.section import HUB_NAME
from trainer.data.csv_lines import SEPARATORS, open_csv
from trainer.data.json_lines import LINES, JsonLines
from trainer.data.local_files import RowFile, local_files
from trainer.data.raw_rows import Chosen, RawRows, joined
from trainer.data.remote_files import expand_url, local_copy, name_in_url
from trainer.data.tables import BUILDERS, Table, load, open_folder, open_table_file
from trainer.data.text_files import BOM, TextFile, TextFormat, check_text
from trainer.data.unpacked import PACKED, unpacked
from trainer.errors import ConfigError, DataError, foreign_errors, reason_of

SUFFIXES = (*LINES, *SEPARATORS, *BUILDERS)
_GIT_LFS = b"version https://git-lfs.github.com/"


def open_raw_rows(dataset: Dataset) -> RawRows:
    """The rows of a configured dataset, none of them loaded yet.

    Raises `ConfigError` for a path, split or hub name that does not exist, `DataError` for a file that cannot be read
    or has no rows.
    """
    parts = dataset.split_parts
    limit = dataset.max_rows if parts == ((dataset.split, ""),) else None
    splits = {name: _open_split(dataset, name, max_rows=limit) for name in dict(parts)}
    rows = joined(dataset.name, [_sliced(splits[name], name, part) for name, part in parts])
    if not len(rows):
        raise DataError(f"the dataset {dataset.name} has no rows")
    if dataset.max_rows is not None and len(rows) > dataset.max_rows:
        rows = Chosen(rows, range(dataset.max_rows))
    return rows


def remote_files(path: str) -> list[RowFile]:
    """Local copies of the files that a URL or its pattern names; none for everything else."""
    return [RowFile(url, local_copy(url)) for url in expand_url(path)] if is_url(path) else []


def _open_split(dataset: Dataset, split: str, *, max_rows: int | None) -> RawRows:
    """All rows of one split of all paths, one source after the other."""
    sources: list[RawRows] = []
    for path in dataset.paths:
        left = None if max_rows is None else max_rows - sum(len(source) for source in sources)
        if left is None or left > 0:
            sources += _open_path(dataset, path, split, max_rows=left)
    return joined(dataset.name, sources)


def _open_path(dataset: Dataset, path: str, split: str, *, max_rows: int | None) -> list[RawRows]:
    files = remote_files(path) or local_files(path)
    place = None if is_url(path) else expand_home(path)
    if dataset.revision is not None and (files or place is None or place.exists()):
        where = "is a URL, which says its revision itself" if place is None else "lies here and has no revisions"
        raise ConfigError(f"the dataset {path} {where}: remove revision: {dataset.revision}")
    if files:
        if split != "train":
            what = "is one file without splits" if len(files) == 1 else "are files without splits"
            write = f"remove split: {dataset.split}" if dataset.split == split else f"write train for {split} in split"
            raise ConfigError(f"{path} {what}: {write}")
        return [_open_file(file, max_rows=max_rows) for file in files]
    if place is not None and place.is_dir():
        return [open_folder(place, split, name=path)]
    if place is not None and place.exists():
        raise ConfigError(f"the dataset {path} is neither a file nor a folder")
    if place is not None and _looks_local(path):
        beside = sorted(one.name for one in place.parent.glob("*")) if place.parent.is_dir() else []
        hint = did_you_mean(place.name, beside)
        raise ConfigError(f"the dataset {path} does not exist (looked for {place.absolute()}){hint}")
    return [Table(path, load(path, path, split=split, revision=dataset.revision))]


def _open_file(file: RowFile, *, max_rows: int | None) -> RawRows:
    name = file.name
    with foreign_errors(f"cannot read the dataset {name}", error=DataError):
        if file.path.stat().st_size == 0:
            raise DataError(f"the dataset {name} has no rows: the file is empty")
        with file.path.open("rb") as opened:
            is_pointer = opened.read(len(_GIT_LFS)) == _GIT_LFS
    if is_pointer:
        raise DataError(f"the dataset {name} is a pointer of Git LFS and holds no rows: get the file with git lfs pull")
    suffixes = [suffix.lower() for suffix in Path(name_in_url(name) if is_url(name) else name).suffixes]
    packed = suffixes.pop() if len(suffixes) > 1 and suffixes[-1] in PACKED else ""
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in SUFFIXES:
        raise ConfigError(
            f"cannot tell the format of {name} from its name: use .jsonl, .csv, .tsv, .json, .parquet or .arrow"
        )
    if suffix in BUILDERS and not (suffix == ".json" and not packed and not _is_array(file.path)):
        return open_table_file(file.path, suffix, name=name)
    path = unpacked(file.path, packed, name=name) if packed else file.path
    return TextFile(path, _layout(path, suffix, name), name=name, max_rows=max_rows)


def _layout(path: Path, suffix: str, name: str) -> TextFormat:
    with foreign_errors(f"cannot read the dataset {name}", error=DataError), path.open("rb") as file:
        check_text(file.read(2), name)
    return open_csv(path, name=name, separator=SEPARATORS[suffix]) if suffix in SEPARATORS else JsonLines()


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(BOM).lstrip().startswith(b"[")


def _sliced(rows: RawRows, name: str, part: str) -> RawRows:
    """The rows of a slice such as `[:90%]`, by the rules of `datasets`: percents are rounded to the nearest row."""
    if not part:
        return rows
    import datasets

    try:
        (found,) = datasets.ReadInstruction.from_spec("rows" + part).to_absolute({"rows": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{rows.name}: the split {name}{part} cannot be taken: {reason_of(error)}") from error
    chosen = range(found.from_, max(found.from_, found.to))
    if not chosen:
        raise ConfigError(f"{rows.name}: the split {name}{part} holds none of its {len(rows)} rows")
    return Chosen(rows, chosen)


def _looks_local(path: str) -> bool:
    """Hub names are `name` or `owner/name`; everything else was meant as a path."""
    known_suffix = Path(path).suffix.lower() in (*SUFFIXES, *PACKED)
    return known_suffix or not re.fullmatch(HUB_NAME, path)
