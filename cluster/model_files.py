"""The files of a model as a node sees them: whether they are the same everywhere, their size, a local copy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.data.content import folder_content
from trainer.errors import ConfigError, InfrastructureError

WHOLE_BYTES, PLACES = 8 * 2**20, 512
"""How much of a model's files is read to tell whether they are the same: samples, beyond 8 MiB in all."""

READ_WHOLE = 2**30

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What tells one model folder from another, without reading all of its weights."""

    files: tuple[tuple[str, int], ...]  # name and bytes of each file beside the others, hidden ones left out
    config_hash: str  # of config.json; empty where there is none
    commit: str | None = None  # of the hub
    contents: tuple[tuple[str, str], ...] = ()  # of each file, where they were read (`trainer/data/content.py`)

    @classmethod
    def of(cls, folder: Path) -> ModelFiles:
        """Without contents. Raises OSError where the folder cannot be read."""
        files = sorted(
            (file.name, file.stat().st_size)
            for file in folder.iterdir()
            if file.is_file() and not file.name.startswith(".")
        )
        config = folder / "config.json"
        digest = hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else ""
        commit = folder.name if folder.parent.name == "snapshots" else None
        return cls(tuple(files), digest, commit)

    @classmethod
    def with_contents(cls, folder: Path) -> ModelFiles:
        """The same, and samples of what the files hold: other weights of the same names and sizes are others. What a
        cache of the hub holds is told by its commit."""
        found = cls.of(folder)
        if found.commit is not None:
            return found
        files = {name: folder / name for name, _ in found.files}
        contents = folder_content(files, whole_bytes=WHOLE_BYTES, places=PLACES)
        return replace(found, contents=tuple(contents.items()))

    @property
    def weight_bytes(self) -> int:
        return sum(size for name, size in self.files if name.endswith(WEIGHTS))

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.files)

    @property
    def short_hash(self) -> str:
        """12 hexadecimal digits of all of it."""
        return hashlib.sha256(repr((self.files, self.config_hash, self.contents)).encode()).hexdigest()[:12]

    def difference(self, other: ModelFiles) -> str | None:
        """How `other` differs, in a few words; None where it is the same."""
        if self.commit and other.commit:  # a cache holds the files that were asked for, not always the same ones
            same = self.commit == other.commit
            return None if same else f"revision {other.commit[:12]}, here {self.commit[:12]}"
        mine, theirs = dict(self.files), dict(other.files)
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in theirs:
                return f"{name} is missing"
            if name not in mine:
                return f"{name} is there, and not here"
            if mine[name] != theirs[name]:
                return f"{name} has {theirs[name]} bytes, here {mine[name]}"
        if self.config_hash != other.config_hash:
            return "config.json has another content"
        read = dict(self.contents)
        changed = [name for name, content in other.contents if read.get(name, content) != content]
        return f"{changed[0]} has another content" if changed else None


def model_contents(path: str, revision: str | None, *, place: str) -> dict[str, str]:
    """What decides the labels of a teacher, by file: weights, config.json and code; of the hub the commit. `place` is
    for messages. Weights of up to 1 GiB are read whole, of larger ones samples (`trainer/data/content.py`).

    Raises `ConfigError` where they are not known yet.
    """
    folder = find_folder(path, revision)
    if folder is not None and folder.parent.name == "snapshots":
        return {"commit": folder.name}
    if folder is None:
        if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            return {"commit": str(revision)}
        raise ConfigError(
            f"{place}: {path} is not on this machine, and a label store must know which weights make its labels: name "
            "the commit, revision: <40 hexadecimal digits>, or fetch the model first"
        )
    files = {file.name: file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")}
    chosen = {name: file for name, file in files.items() if name == "config.json" or name.endswith((".py", *WEIGHTS))}
    return folder_content(chosen, whole_bytes=READ_WHOLE, places=PLACES)


def find_folder(path: str, revision: str | None) -> Path | None:
    """The folder of a model on this node: a local one, or what the hub's cache holds; None where neither is there."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def local_copy(path: str, folder: Path, *, timeout_s: float) -> Path:
    """A copy of the model folder `path` under `folder`, made now unless it is there. Safe to call from all processes
    of a node: one copies, the others wait, and nobody sees half of it.

    The copy's name holds the identity of the source (names, sizes, samples of what the files hold), so a changed model
    is copied anew.
    Raises `ConfigError` for what cannot be copied or does not fit, `InfrastructureError` at the deadline.
    """
    source = Path(path).expanduser()
    where = f"node {socket.gethostname()}"
    if not source.is_dir():
        raise ConfigError(f"local_copy: {path} is no folder on {where}; only a model that is a folder can be copied")
    try:
        wanted = ModelFiles.with_contents(source)
        target = folder.expanduser().absolute() / f"{source.resolve().name}-{wanted.short_hash}"
        with _lock(target, timeout_s=timeout_s):
            if not target.is_dir():
                _copy(source, target, wanted, where)
            elif (difference := wanted.difference(ModelFiles.with_contents(target))) is not None:
                raise ConfigError(
                    f"local_copy: {target} on {where} is no longer a copy of {path}: {difference}. Delete it"
                )
    except OSError as error:
        raise ConfigError(f"local_copy: {where} cannot copy {path} to {folder}: {error}") from None
    return target


@contextlib.contextmanager
def _lock(target: Path, *, timeout_s: float) -> Iterator[None]:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(target.with_name(f".{target.name}.lock"), timeout=timeout_s):
            yield
    except Timeout:
        raise InfrastructureError(
            f"local_copy: another process of node {socket.gethostname()} has been copying to {target} for "
            f"{timeout_s:.0f} s; raise faults.start_timeout_s"
        ) from None


def _copy(source: Path, target: Path, wanted: ModelFiles, where: str) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < wanted.num_bytes:
        raise ConfigError(
            f"local_copy: {source} has {wanted.num_bytes / 1e9:.1f} GB, and {where} has {free / 1e9:.1f} GB free in "
            f"{target.parent}"
        )
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        for name, _ in wanted.files:
            shutil.copyfile(source / name, draft / name)
            with (draft / name).open("rb") as file:
                os.fsync(file.fileno())
        if (difference := wanted.difference(ModelFiles.with_contents(draft))) is not None:
            raise ConfigError(f"local_copy: the copy of {source} on {where} is not the original: {difference}")
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
