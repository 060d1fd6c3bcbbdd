"""Fingerprints of input files, to detect whether they changed since a run began.

small    read whole: any change is seen
large    its size, and 16 KiB at each of evenly spaced places, beginning and end among them; of a safetensors file also
         its table of tensors, and a place in every tensor

A sample of a large file misses a change that leaves the size as it is and lies between the places: a few values inside
one tensor, some letters in one row. Whatever makes lines longer or shorter, other weights, and another order of rows
are seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

BLOCK_BYTES = 16 * 2**10
MAX_TENSORS = 4096
MAX_TABLE_BYTES = 100 * 2**20  # safetensors' own limit


def file_content(path: Path, *, whole_bytes: int, places: int) -> str:
    """`<size> bytes, <16 hexadecimal digits>`, whatever the file is called and wherever it lies. Files up to
    `whole_bytes` are read whole, of others `places` blocks. Raises OSError."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= whole_bytes:
            return f"{size} bytes, {hashlib.file_digest(file, lambda: digest).hexdigest()}"
        last = size - BLOCK_BYTES
        starts = {last * place // (places - 1) for place in range(places)}
        if path.suffix == ".safetensors":
            table, middles = _tensors(file.fileno(), size)
            digest.update(table)
            starts.update(min(middle, last) for middle in middles)
        for start in sorted(starts):
            digest.update(os.pread(file.fileno(), BLOCK_BYTES, start))
    return f"{size} bytes, {digest.hexdigest()}"


def folder_content(files: Mapping[str, Path], *, whole_bytes: int, places: int) -> dict[str, str]:
    """`file_content` of each, by name: all are read whole if together they are at most `whole_bytes`, and many large
    ones share the places, two each at least."""
    total = sum(path.stat().st_size for path in files.values())
    limit = whole_bytes if total <= whole_bytes else BLOCK_BYTES * 2
    share = max(2, places // max(1, len(files)))
    return {name: file_content(path, whole_bytes=limit, places=share) for name, path in sorted(files.items())}


def files_below(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its name relative to it; hidden ones, and what lies in hidden folders, left out."""
    named = ((path.relative_to(folder), path) for path in folder.rglob("*") if path.is_file())
    return {name.as_posix(): path for name, path in named if not any(part.startswith(".") for part in name.parts)}


def _tensors(descriptor: int, size: int) -> tuple[bytes, list[int]]:
    """The table of a safetensors file and a place inside each tensor, evenly chosen ones where there are very many;
    nothing for a damaged file, which others report."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if 8 + length > min(size, MAX_TABLE_BYTES):
        return b"", []
    table = os.pread(descriptor, length, 8)
    try:
        spans = [entry["data_offsets"] for name, entry in json.loads(table).items() if name != "__metadata__"]
        middles = sorted(8 + length + (int(first) + int(end)) // 2 for first, end in spans)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return table, []
    return table, [m for m in middles[:: -(-len(middles) // MAX_TENSORS) or 1] if 0 <= m < size]
