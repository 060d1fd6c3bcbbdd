"""The label store: labels that were made once, on a disk, for the next epoch, the next run and the next start.

    <store>/label-store.json            the format of all of it
            <space>/space.json          what its labels are (`store_space.py`)
            <space>/<writer>-<n>.safetensors   shards (`store_shard.py`)

Any number of processes and hosts may use one folder at once, without locks. A shard has one writer, is written beside
its place and renamed into it when all of it is on the disk, and is never changed; so a process that is killed loses
what it had not written yet, and nobody reads half a shard. A shard that cannot be believed is put aside under another
name, told once, and its labels count as missing; so do those of one that lies in the folder of another space.

At `max_bytes`, or when the disk is full, nothing more is written, which is told once. Nothing is evicted: an epoch
reads every label exactly once, so that whatever rule evicts would evict what is read next.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.errors import ConfigError
from trainer.labels.store_shard import FORMAT, Columns, DamagedShard, Shard, open_shard
from trainer.labels.store_space import LabelSpace
from trainer.labels.store_writer import MARKER, SPACE, SUFFIX, Limits, Writer, num_bytes
from trainer.records import read_json

DAMAGED = ".damaged"
LOOK_AGAIN_S = 5.0  # between two looks for shards of other writers


@dataclass(slots=True)
class _Space:
    """What is known of one space."""

    folders: tuple[Path, ...]  # its own, and those of spaces that it includes
    found: dict[bytes, tuple[Shard, int]] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)  # files
    bad: set[Path] = field(default_factory=set)  # of them those that are not used
    looked_at: float = -1e9


class LabelStore:
    """Of one process. Thread-safe. Constructing one touches nothing."""

    def __init__(self, path: Path, *, limits: Limits | None) -> None:
        """`limits` of what is written; None: it is only read."""
        self._path = path
        self._lock = threading.Lock()
        self._spaces: dict[str, _Space] = {}
        self._notes: list[str] = []
        self._writer = None if limits is None else Writer(path, limits, written=self._add_shard, note=self._note)

    def read(self, space: LabelSpace, keys: Iterable[bytes]) -> dict[bytes, Columns]:
        """The labels that are there, by key."""
        found: dict[bytes, Columns] = {}
        for key in dict.fromkeys(keys):
            labels = self._writer.waiting(space, key) if self._writer is not None else None
            if labels is None:
                labels = self._from_disk(space, key)
            if labels is not None:
                found[key] = labels
        return found

    def missing(self, space: LabelSpace, keys: Iterable[bytes]) -> list[bytes]:
        """Those that are not there, by the index alone: whether the labels are whole is seen when they are read."""
        with self._lock:
            known = self._look(space, again_after_s=LOOK_AGAIN_S)
            return [key for key in dict.fromkeys(keys) if key not in known.found]

    def unreadable(self, space: LabelSpace, keys: Iterable[bytes]) -> list[bytes]:
        """Those that are not there, or not whole. Reads all labels, of one sequence after another, and keeps none."""
        return [key for key in dict.fromkeys(keys) if not self.read(space, [key])]

    def write(self, space: LabelSpace, labels: Mapping[bytes, Columns]) -> None:
        """Keep labels, soon; those that are there already are left as they are. Waits for no disk."""
        assert self._writer is not None, "this store is only read"
        with self._lock:
            found = self._look(space, again_after_s=None).found
            new = {key: columns for key, columns in labels.items() if key not in found}
        self._writer.add(space, new)

    def spaces(self) -> list[LabelSpace]:
        """All that the store holds labels of; a description that cannot be read, or is of another folder, is left
        out."""
        found = []
        for file in sorted(self._path.glob(f"*/{SPACE}")):
            with contextlib.suppress(OSError, ConfigError):
                told = read_json(file)
                if isinstance(told, dict) and (space := LabelSpace(told)).id == file.parent.name:
                    found.append(space)
        return found

    @property
    def keeps(self) -> bool:
        """Whether labels are written; no more once there is no room."""
        return self._writer is not None and not self._writer.stopped

    def num_bytes(self) -> int:
        """Of all its files."""
        return num_bytes(self._path)

    def notes(self) -> tuple[str, ...]:
        """What a person should know, each once."""
        with self._lock:
            notes, self._notes = tuple(self._notes), []
        return notes

    def _note(self, text: str) -> None:
        with self._lock:
            self._notes.append(f"label store {self._path}: {text}")

    def close(self) -> None:
        """Write what waits."""
        if self._writer is not None:
            self._writer.close()

    def _from_disk(self, space: LabelSpace, key: bytes) -> Columns | None:
        with self._lock:
            place = self._look(space, again_after_s=None).found.get(key)
            place = place or self._look(space, again_after_s=LOOK_AGAIN_S).found.get(key)
        if place is None:
            return None
        shard, index = place
        try:
            return shard.read(index)
        except (OSError, DamagedShard) as error:
            self._put_aside(space, shard.path, error)
            return self._from_disk(space, key)  # it may be in another shard too

    def _look(self, space: LabelSpace, *, again_after_s: float | None) -> _Space:
        """What is known of a space, after looking for new shards where nobody looked yet, or not lately. Under lock."""
        known = self._spaces.get(space.id)
        if known is None:
            older = [other.id for other in self.spaces() if other.id != space.id and space.includes(other)]
            known = self._spaces[space.id] = _Space(tuple(self._path / name for name in (space.id, *older)))
            again_after_s = 0.0
        if again_after_s is None or time.monotonic() - known.looked_at < again_after_s:
            return known
        known.looked_at = time.monotonic()
        for path in [path for folder in known.folders for path in _shards(folder) if path not in known.seen]:
            known.seen.add(path)
            self._open(known, path)
        return known

    def _open(self, known: _Space, path: Path) -> None:
        try:
            shard = open_shard(path)
            if shard.space != path.parent.name:
                raise DamagedShard(f"it holds labels of another kind, those of {shard.space}", is_foreign=True)
        except (OSError, DamagedShard) as error:
            known.bad.add(path)
            self._notes.append(self._aside(path, error))
            return
        for index, key in enumerate(shard.keys):
            known.found.setdefault(key, (shard, index))

    def _put_aside(self, space: LabelSpace, path: Path, error: Exception) -> None:
        with self._lock:
            known = self._spaces[space.id]
            gone = [key for key, (shard, _) in known.found.items() if shard.path == path]
            for key in gone:
                del known.found[key]
            if gone:  # else another thread was here
                self._notes.append(self._aside(path, error))
                known.bad.add(path)
                known.seen = set(known.bad)  # others may hold some of its labels too
                known.looked_at = -1e9

    def _aside(self, path: Path, error: Exception) -> str:
        """Under another name, where this process may; returns what to say. A file that is gone, or of another format,
        is left as it is."""
        reason = str(error) if isinstance(error, DamagedShard) else (getattr(error, "strerror", None) or str(error))
        moved = ""
        if self._writer is not None and isinstance(error, DamagedShard) and not error.is_foreign:
            with contextlib.suppress(OSError):
                path.rename(path.with_name(path.name + DAMAGED))
                moved = f" It is now called {path.name}{DAMAGED}, and can be removed."
        name = path.relative_to(self._path)
        return f"label store {self._path}: {name} is not used, {reason}: its labels count as missing.{moved}"

    def _add_shard(self, space: LabelSpace, path: Path) -> None:
        """A shard that this process wrote."""
        with self._lock:
            known = self._look(space, again_after_s=None)
            known.seen.add(path)
            self._open(known, path)


def check_folder(path: Path) -> None:
    """Raises `ConfigError` where a folder is no label store that this version reads; one that is empty, or not there
    yet, may become one."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"store.path: {path} is a file; name a folder")
    try:
        names = set(os.listdir(path))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"store.path: cannot read {path}: {error.strerror or error}") from None
    if not names:
        return
    if MARKER not in names:
        raise ConfigError(f"store.path: {path} holds other files and is no label store; name a folder of its own")
    told = read_json(path / MARKER)
    found = told.get("format") if isinstance(told, dict) else None
    if found != FORMAT:
        raise ConfigError(
            f"store.path: {path} is a label store of format {found}, and this version has format {FORMAT}: name "
            "another folder, or remove that one"
        )


def _shards(folder: Path) -> list[Path]:
    """Of a space, in the order of their names."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [folder / name for name in sorted(names) if name.endswith(SUFFIX) and not name.startswith(".")]
