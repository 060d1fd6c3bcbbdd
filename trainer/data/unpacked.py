"""Compressed text files, unpacked into the cache: rows are read by their places, which a compressed file has not."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from trainer.data.cache import cache_for
from trainer.errors import ConfigError, DataError, foreign_errors

PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""fsspec's name of each."""


def unpacked(path: Path, suffix: str, *, name: str) -> Path:
    """The unpacked file, made once for each content. Raises `DataError` for a damaged one."""
    opened = unpacker(suffix, name)
    hint = "is the file cut off, or compressed by something else than its name says?"
    with foreign_errors(f"cannot read the dataset {name}", error=DataError, hint=hint):
        target = cache_for({path.name: path}) / "unpacked"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as draft:
                try:
                    with path.open("rb") as file, opened(file, mode="rb") as content:
                        shutil.copyfileobj(content, draft, 2**20)
                    os.replace(draft.name, target)
                except BaseException:
                    os.unlink(draft.name)
                    raise
    return target


def unpacker(suffix: str, name: str) -> Callable[..., BinaryIO]:
    """What opens the text in an open file. Raises `ConfigError` where its package is not installed."""
    from fsspec.compression import compr

    if PACKED[suffix] not in compr:
        raise ConfigError(f"the dataset {name}: {suffix} needs a package that is not installed: pip install zstandard")
    return compr[PACKED[suffix]]
