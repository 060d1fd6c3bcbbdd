"""One shard of the label store: the labels of many sequences in a safetensors file, written whole and never changed.

    keys       uint8 [S, 16]     of each sequence
    offsets    int64 [C, S + 1]  sequence s owns entries offsets[c, s] : offsets[c, s + 1] of column c
    checksums  uint8 [S, 16]     of key, names, dtypes, shapes and bytes of a sequence's labels
    column.x   the wire's own bytes of column x of all sequences, one after another

Safetensors, because it is a table in front of flat arrays: any tool opens it, a reader needs no parser beyond JSON, and
one sequence is one read a column. What a reader believes is checked first: the three arrays by a checksum among the
metadata, the labels by their own, so that a flipped bit anywhere is an error and never a label.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

FORMAT = "1"
"""Of shards, and of the folder they lie in. Another layout is another number."""

KEY_BYTES = 16
MAX_TABLE_BYTES = 2**20  # of a header: a few hundred bytes a column
_COLUMN = "column."
_DTYPES = {"U8": "|u1", "U16": "<u2", "U32": "<u4", "I8": "|i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_DTYPES |= {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "|b1"}

Columns = Mapping[str, np.ndarray]
"""Labels of one sequence: each column `[n, ...]`, bfloat16 as its bits in uint16."""


class DamagedShard(Exception):
    """A shard that cannot be used; the text says why. `is_foreign`: it is whole, and of another format."""

    def __init__(self, reason: str, *, is_foreign: bool = False) -> None:
        super().__init__(reason)
        self.is_foreign = is_foreign


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def entry_bytes(self) -> int:
        """Of one entry along the first axis."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Shard:
    """What a file holds, without its labels."""

    path: Path
    space: str  # the id of the space that it was written for, by its metadata
    keys: tuple[bytes, ...]
    columns: tuple[tuple[str, _Place], ...]
    offsets: np.ndarray  # int64 [C, S + 1]
    checksums: np.ndarray  # uint8 [S, 16]

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The labels of a sequence. Raises `DamagedShard` where they are not what was written, OSError where the file
        cannot be read."""
        read: dict[str, np.ndarray] = {}
        with self.path.open("rb") as file:
            for number, (name, place) in enumerate(self.columns):
                first, end = (int(edge) for edge in self.offsets[number, index : index + 2])
                wanted = (end - first) * place.entry_bytes
                raw = os.pread(file.fileno(), wanted, place.start + first * place.entry_bytes)
                if len(raw) != wanted:
                    raise DamagedShard("it is cut off")
                read[name] = np.frombuffer(raw, place.dtype).reshape(end - first, *place.shape[1:])
        if checksum(self.keys[index], read) != self.checksums[index].tobytes():
            raise DamagedShard("labels in it do not match their checksum")
        return read


def checksum(key: bytes, columns: Columns) -> bytes:
    """16 bytes of the key and of everything that decides what the numbers are."""
    digest = hashlib.blake2b(key, digest_size=16)
    for name, values in columns.items():
        digest.update(f"{name} {values.dtype.str} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.digest()


def shard_bytes(labels: Mapping[bytes, Columns], *, origin: Mapping[str, str]) -> bytes:
    """The content of a shard with these labels, by key; all have columns of equal names, dtypes and widths. `origin`
    says of which `space`, and more for people who look at the file."""
    names = tuple(next(iter(labels.values())))
    assert all(tuple(columns) == names for columns in labels.values()), names
    counts = [[len(columns[name]) for columns in labels.values()] for name in names]
    arrays = {
        "keys": np.stack([np.frombuffer(key, np.uint8) for key in labels]),
        "offsets": np.array([np.cumsum([0, *count]) for count in counts], dtype=np.int64),
        "checksums": np.stack([np.frombuffer(checksum(*item), np.uint8) for item in labels.items()]),
    }
    told = {"format": FORMAT, "columns": json.dumps(names), "index_checksum": _index_checksum(arrays)}
    for name in names:
        arrays[_COLUMN + name] = np.concatenate([columns[name] for columns in labels.values()])
    return save(arrays, metadata={**origin, **told})


def open_shard(path: Path) -> Shard:
    """Reads what comes before the labels. Raises `DamagedShard`, and OSError where the file cannot be read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        places, told = _table(file.read(8), lambda length: os.pread(file.fileno(), length, 8), size)
        if told.get("format") != FORMAT:
            raise DamagedShard(f"it is of format {told.get('format')}, not {FORMAT}", is_foreign=True)
        arrays = {name: _array(file.fileno(), places, name) for name in ("keys", "offsets", "checksums")}
    if told.get("index_checksum") != _index_checksum(arrays):
        raise DamagedShard("its index does not match its checksum")
    try:
        columns = tuple((str(name), places[_COLUMN + str(name)]) for name in json.loads(told["columns"]))
    except (ValueError, KeyError, TypeError):
        raise DamagedShard("its columns are not those that were written") from None
    keys = tuple(row.tobytes() for row in arrays["keys"])
    ends = [place.shape[0] for _, place in columns]
    if arrays["offsets"].shape != (len(columns), len(keys) + 1) or arrays["offsets"][:, -1].tolist() != ends:
        raise DamagedShard("its index does not fit its columns")
    return Shard(path, told.get("space", ""), keys, columns, arrays["offsets"], arrays["checksums"])


def _index_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    return checksum(b"", {name: arrays[name] for name in ("keys", "offsets", "checksums")}).hex()


def _table(start: bytes, read: Callable[[int], bytes], size: int) -> tuple[dict[str, _Place], dict[str, str]]:
    """Tensors by name, and the metadata, of a safetensors file of `size` bytes."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 0 < length <= min(size - 8, MAX_TABLE_BYTES):
        raise DamagedShard("it is no safetensors file, or cut off")
    try:
        table = json.loads(read(length))
        told = {str(key): str(value) for key, value in table.pop("__metadata__", {}).items()}
        places = {name: _place(entry, 8 + length) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedShard("its table cannot be read") from None
    if any(place.stop > size for place in places.values()):
        raise DamagedShard("it is cut off")
    return places, told


def _place(entry: Mapping[str, Any], base: int) -> _Place:
    first, end = (base + int(edge) for edge in entry["data_offsets"])
    shape = tuple(int(extent) for extent in entry["shape"])
    place = _Place(np.dtype(_DTYPES[entry["dtype"]]), shape, first, end)
    if not shape or min(shape) < 0 or first < base or place.entry_bytes * shape[0] != end - first:
        raise ValueError(entry)
    return place


def _array(descriptor: int, places: Mapping[str, _Place], name: str) -> np.ndarray:
    if name not in places:
        raise DamagedShard(f"it has no {name}")
    place = places[name]
    raw = os.pread(descriptor, place.stop - place.start, place.start)
    if len(raw) != place.stop - place.start:
        raise DamagedShard("it is cut off")
    return np.frombuffer(raw, place.dtype).reshape(place.shape)
