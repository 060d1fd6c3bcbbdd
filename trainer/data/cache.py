"""Folders in the cache of `datasets` for what is made of files: tables, unpacked text, copies of remote ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.data.content import folder_content

WHOLE_BYTES, PLACES = 256 * 2**20, 1024
"""How much of row files is read to tell whether they are the same (`trainer/data/content.py`)."""


def cache_for(files: Mapping[str, Path]) -> Path:
    """A cache folder for what is made of the present content of files. The cache key of `datasets` itself is the time
    of modification, which a copy or an unpacked archive may keep although the rows differ."""
    content = folder_content(files, whole_bytes=WHOLE_BYTES, places=PLACES)
    changed = {name: path.stat().st_ctime_ns for name, path in files.items()}  # set by every write, not by its author
    return cache_folder([content, changed])


def cache_folder(key: Any) -> Path:
    """A folder below the cache of `datasets`, named by the hash of a key that JSON can write."""
    import datasets

    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(datasets.config.HF_DATASETS_CACHE) / "stillhouse" / digest
