"""The writing half of the label store: labels wait in memory until they are a shard's worth, then a thread puts them on
the disk. Scoring waits for no disk, and a disk that fails costs nothing but the labels' being kept."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.labels.store_shard import FORMAT, Columns, shard_bytes
from trainer.labels.store_space import LabelSpace

MARKER = "label-store.json"
SPACE = "space.json"
SUFFIX = ".safetensors"
UNFINISHED = ".tmp"
LEFT_OVER_S = 86400.0  # after which what a killed process left unfinished is removed
CLOSE_S = 15.0  # that a disk has at the end
GOES_ON = "nothing more is written, and labels are made and used as before"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is written, and when."""

    max_bytes: int  # of all files in the store, by whomever
    shard_bytes: int = 32 * 2**20  # of labels in memory: few enough to lose, many enough for few files
    wait_s: float = 30.0  # labels wait for this long at most
    free_bytes: int = 512 * 2**20  # of the disk, left alone: checkpoints may lie there too

    @property
    def waiting_bytes(self) -> int:
        """In memory, while a disk is slow; labels made beyond that are not kept."""
        return 8 * self.shard_bytes


@dataclass(slots=True)
class _Batch:
    """Labels of one space."""

    space: LabelSpace
    labels: dict[bytes, Columns]
    since: float
    num_bytes: int = 0


class Writer:
    """Of one process, and the only one of its shards."""

    def __init__(
        self, path: Path, limits: Limits, *, written: Callable[[LabelSpace, Path], None], note: Callable[[str], None]
    ) -> None:
        """`written` hears of each shard, before its labels are forgotten here."""
        self._path = path
        self._limits = limits
        self._written, self._note = written, note
        self._name = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._count = 0
        self._changed = threading.Condition()
        self._batches: dict[str, _Batch] = {}  # by space
        self._writing: _Batch | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._closing = False
        self._slow = False  # which is told

    @property
    def stopped(self) -> bool:
        """Whether nothing more is written."""
        return self._stopped

    def waiting(self, space: LabelSpace, key: bytes) -> Columns | None:
        """Labels that are not on the disk yet."""
        with self._changed:
            batches = (self._batches.get(space.id), self._writing)
            found = [one.labels[key] for one in batches if one and one.space.id == space.id and key in one.labels]
        return found[0] if found else None

    def add(self, space: LabelSpace, labels: Mapping[bytes, Columns]) -> None:
        """Keep labels that are not waiting already."""
        with self._changed:
            if self._stopped or not labels:
                return
            waiting = sum(batch.num_bytes for batch in self._batches.values())
            if waiting >= self._limits.waiting_bytes:
                told, self._slow = self._slow, True
                if not told:
                    self._note(
                        f"its disk is slower than labels are made: {waiting / 1e6:.0f} MB wait for it, and what is "
                        "made meanwhile is not kept"
                    )
                return
            batch = self._batches.setdefault(space.id, _Batch(space, {}, time.monotonic()))
            for key, columns in labels.items():
                if key not in batch.labels:
                    batch.labels[key] = columns
                    batch.num_bytes += sum(column.nbytes for column in columns.values())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="label-store")
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Write what waits; a disk that does not answer is not waited for long."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        _remove_left_over(self._path)
        while (batch := self._next()) is not None:
            try:
                if path := self._write(batch):
                    self._written(batch.space, path)
            except OSError as error:
                self._stop(f"{error.strerror or error}: {GOES_ON}")
            with self._changed:
                self._writing = None

    def _next(self) -> _Batch | None:
        """The next that is due; None at the end."""
        with self._changed:
            while True:
                now = time.monotonic()
                for name, batch in self._batches.items():
                    late = now - batch.since >= self._limits.wait_s
                    if late or self._closing or batch.num_bytes >= self._limits.shard_bytes:
                        self._writing = self._batches.pop(name)
                        return self._writing
                if self._closing:
                    return None
                self._changed.wait(self._limits.wait_s if self._batches else None)

    def _write(self, batch: _Batch) -> Path | None:
        """Where the batch lies now; None where there is no room for it."""
        if self._stopped:
            return None
        folder = self._folder(batch.space)
        content = shard_bytes(batch.labels, origin={"writer": self._name, "space": batch.space.id})
        used = num_bytes(self._path)
        if used + len(content) > self._limits.max_bytes:
            self._stop(
                f"it holds {used / 1e9:.2f} GB, and store.max_bytes allows {self._limits.max_bytes / 1e9:.2f} GB: "
                "nothing more is written, and what is there is used"
            )
            return None
        free = shutil.disk_usage(folder).free
        if free - len(content) < self._limits.free_bytes:
            self._stop(f"the disk has {free / 1e9:.2f} GB left: {GOES_ON}")
            return None
        return self._put(folder / f"{self._name}-{self._count + 1:05}{SUFFIX}", content)

    def _folder(self, space: LabelSpace) -> Path:
        """Of a space, made where it is not there."""
        folder = self._path / space.id
        self._path.mkdir(parents=True, exist_ok=True)
        if not (self._path / MARKER).exists():
            self._put(self._path / MARKER, json.dumps({"format": FORMAT}).encode())
        folder.mkdir(exist_ok=True)
        if not (folder / SPACE).exists():
            self._put(folder / SPACE, space.text.encode())
        return folder

    def _put(self, path: Path, content: bytes) -> Path:
        """A file, written beside its place and renamed into it when it is on the disk. Readable for whoever the umask
        allows: a store may be shared."""
        self._count += 1
        draft = path.with_name(f".{self._name}-{self._count:05}{UNFINISHED}")
        try:
            with draft.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return path

    def _stop(self, text: str) -> None:
        with self._changed:
            told, self._stopped = self._stopped, True
            self._batches.clear()
        if not told:
            self._note(text)


def num_bytes(folder: Path) -> int:
    """Of all files of a store; what goes away meanwhile does not count."""
    found = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found += num_bytes(Path(entry.path))
            else:
                with contextlib.suppress(FileNotFoundError):
                    found += entry.stat(follow_symlinks=False).st_size
    return found


def _remove_left_over(folder: Path) -> None:
    for draft in folder.rglob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            if time.time() - draft.stat().st_mtime > LEFT_OVER_S:
                draft.unlink()
