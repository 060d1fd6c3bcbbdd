"""The folder of one run: what lies where, who holds it, and how a file in it is written so that it is never half there.

<run>/  config.yaml      the resolved configuration        checkpoints/   committed checkpoints
        manifest.json    versions, machine, roles, counts  student/       the exported student
        metrics.jsonl    one record a line                 logs/          one file per role
        timeline.jsonl   who was busy when                 trackers/      what trackers were sent, if asked for
        samples.json     tokens for the viewer             report.html    everything above, to look at
        generations.json answers before and after          exit.json      how the run ended
        trained.json     labels of the last step seen      worst.json     held-out text furthest from the teacher
        rejected.jsonl   rows that were not used
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import Field
from typing_extensions import TypedDict

from trainer.errors import ConfigError
from trainer.records import Moment, read_record
from trainer.records import append_lines as append_lines
from trainer.records import read_json as read_json
from trainer.records import read_lines as read_lines


class Turn(TypedDict):
    """Of a prompt in generations.json; role "" where the row is no conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended: what exit.json says."""

    code: int
    reason: str = ""
    time: Moment = 0.0


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a run folder: what .lock-owner.json says."""

    pid: Annotated[int, Field(gt=0, lt=2**31)]
    host: str
    since: Moment

    def text(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"pid {self.pid} on host {self.host} since {since}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Typed paths of a run folder. Constructing one touches nothing; `create` makes it."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make the folder (mode 0700, parents too) or take an existing one, and prove that it can be written.

        Raises ConfigError when it cannot, naming the system's reason.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ConfigError(
                f"folder: cannot write the run folder {path}: {error.strerror or error}. "
                "Free the place or name another folder, for example folder: runs/my-run"
            ) from None
        return cls(path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.json"

    @property
    def trained(self) -> Path:
        return self.path / "trained.json"

    @property
    def worst(self) -> Path:
        return self.path / "worst.json"

    @property
    def generations(self) -> Path:
        return self.path / "generations.json"

    @property
    def rejected(self) -> Path:
        return self.path / "rejected.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def exit(self) -> Path:
        return self.path / "exit.json"

    @property
    def lock_owner(self) -> Path:
        """Who holds the lock, while it is held."""
        return self.path / ".lock-owner.json"

    def ending(self) -> Ending | None:
        """None where the run has not ended. Raises `ConfigError` where exit.json says nothing that can be read."""
        try:
            return read_record(self.exit, Ending)
        except FileNotFoundError:
            return None

    def owner(self) -> Owner | None:
        """Who holds the folder; None where nobody does. Raises `ConfigError` as `ending` does."""
        try:
            return read_record(self.lock_owner, Owner)
        except FileNotFoundError:
            return None

    def _owner_text(self) -> str:
        try:
            owner = self.owner()
        except ConfigError:
            return f"another process ({self.lock_owner.name} does not say which)"
        return "another process that just took it" if owner is None else owner.text()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one run. The lock ends with the process, however it ends.

        Raises ConfigError when another process holds it, naming process, host and start.
        """
        owner_file = self.lock_owner
        lock = FileLock(self.path / ".lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"folder: the run folder {self.path} is in use by {self._owner_text()}. "
                "Wait for that run, stop it, or give this one another folder"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"folder: cannot lock the run folder {self.path}: {error.strerror or error}. "
                "Name a folder on a file system with locks"
            ) from None
        try:
            write_json(owner_file, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
            yield
        finally:
            owner_file.unlink(missing_ok=True)
            lock.release()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, whatever dies meanwhile.

    Paths become strings, numpy scalars numbers; a float that is not finite becomes null (JSON has none).
    """
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomic: temporary file in the same folder, fsync, rename, fsync of the folder."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Inside, an empty folder beside `target`, which becomes `target` when the block ends, and is removed on an error.

    `target` must not exist by then, or be empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield working
        working.chmod(0o755)
        working.replace(target)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def plain(value: Any) -> Any:
    """The same value made of JSON's own types; see `write_json`."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
