"""What a checkpoint says of itself: its state, and size and hash of every file, in one file that protects itself.

    MANIFEST.json = {"format", "state", "files": {name: {"bytes", "blake2b"}}, "blake2b": of all the rest}

Reading one trusts nothing: a changed digit anywhere, another shape or a missing rank is `Damaged`, and never a resume
from somewhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from trainer.errors import ConfigError, reason_of
from trainer.types import Cursor

MANIFEST = "MANIFEST.json"
FORMAT = 2
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a JSON file of any content, and taking it for an object with certain keys, can raise."""


class Damaged(Exception):
    """A folder is no checkpoint that can be resumed from; the text names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a resumed run needs beside the shards."""

    step: int
    cursor: Cursor
    config_hash: str
    world: int
    non_finite_steps: int
    total_steps: int = 0  # that the learning rate was made for; 0: not recorded
    contents: dict[str, str] = field(default_factory=dict)  # what the inputs held, by place (`launch/contents.py`)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file as it was written."""

    bytes: int
    blake2b: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that is what was written."""

    state: TrainingState
    files: dict[str, FileRecord]


_MANIFEST = TypeAdapter(Manifest)


def write_manifest(folder: Path, state: TrainingState) -> None:
    """Record what lies in a folder and see it on disk. Raises OSError also where a rank left its files out."""
    files = {
        str(path.relative_to(folder)): FileRecord(path.stat().st_size, hash_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if missing := _missing(files, world=state.world):
        raise OSError(f"the ranks wrote no {missing} into {folder}")
    content = {
        "format": FORMAT,
        "state": asdict(state),
        "files": {name: asdict(record) for name, record in files.items()},
    }
    with open(folder / MANIFEST, "w") as file:
        json.dump({**content, "blake2b": digest_of(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Raises `Damaged`; ConfigError for one that is whole, and of another version of the format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    try:
        content = json.loads(path.read_text())
        digest = content.pop("blake2b")
        changed = digest != digest_of(content)
    except UNREADABLE as error:
        raise Damaged(f"{path} cannot be read: {reason_of(error)}") from None
    if changed:
        raise Damaged(f"{path} has changed since it was written")
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"{path} has the format {content.get('format')!r}, this version of Stillhouse reads {FORMAT}: go on with "
            "the version that wrote it, or give the run another name or folder"
        )
    try:
        manifest = _MANIFEST.validate_json(json.dumps(content), strict=True)
    except ValueError as error:
        raise Damaged(f"{path} is no manifest of a checkpoint: {reason_of(error)}") from None
    if missing := _missing(manifest.files, world=manifest.state.world):
        raise Damaged(f"{path} lists no {missing}")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises `Damaged` where a file of the manifest has not the size and hash that it lists."""
    for name, written in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != written.bytes:
                raise Damaged(f"{path} has {size} bytes, {written.bytes} were written")
            if hash_of(path) != written.blake2b:
                raise Damaged(f"{path} has changed since it was written")
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error}") from None


def hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of(content: dict[str, Any]) -> str:
    """Of the content, not of its spaces and line breaks."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _missing(files: dict[str, FileRecord], *, world: int) -> str | None:
    """The first file without which a group of `world` ranks cannot go on: every rank's random states and its shard of
    the optimizer, and the model's weights, whole or one shard a rank (ZeRO-3)."""
    for rank in range(max(1, world)):
        if f"rank_{rank}.pt" not in files:
            return f"rank_{rank}.pt"
        if not _holds(files, rf"(\w+_)?pp_rank_{rank}_\w*optim_states\.pt"):
            return f"optimizer states of rank {rank}"
        if not _holds(files, rf"(mp_rank_\d+|\w*pp_rank_{rank}_\w+)_model_states\.pt"):
            return f"model states of rank {rank}"
    return None


def _holds(files: dict[str, FileRecord], name: str) -> bool:
    return any(re.fullmatch(f"zero/{name}", file) for file in files)
