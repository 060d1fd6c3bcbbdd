"""Where the output of a role's process goes: one file per role under the run folder, engine output included."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.engines.refusals import BY_PROXY
from trainer.errors import ConfigError

MAX_BYTES = 64 * 2**20
MARK = ".shared"
START = "--- started"  # begins what one process writes

MAX_READ_BYTES = 256 * 2**10
MAX_ERROR_CHARACTERS = 600
LAST_LINES = 12

ERROR = re.compile(r"\b[\w.]*(?:Error|Exception|Refused|Killed)\b: .+|\b(?:Segmentation fault|Bus error|Killed)\b.*")


@dataclass(frozen=True, slots=True)
class SharedFolder:
    """The run folder as the controller sees it, with a mark by which every other node must recognise it."""

    path: Path
    mark: str

    @classmethod
    def of(cls, path: Path) -> SharedFolder:
        """Leave a fresh mark in the folder."""
        folder = cls(path.absolute(), secrets.token_hex(8))
        (folder.path / MARK).write_text(folder.mark)
        return folder

    def check(self) -> None:
        """Raises `ConfigError` where this node does not see the same folder, or cannot write into it."""
        where = f"node {socket.gethostname()}"
        try:
            seen = (self.path / MARK).read_text()
        except OSError as error:
            raise ConfigError(
                f"folder: {where} cannot read the run folder {self.path} ({error.strerror}); a run on several nodes "
                "needs a folder that all of them share, for example on NFS"
            ) from None
        if seen != self.mark:
            raise ConfigError(f"folder: {where} has another folder at {self.path}, not the one this run writes to")
        probe = self.path / f"{MARK}-{secrets.token_hex(4)}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"folder: {where} cannot write to {self.path}: {error.strerror}") from None


def redirect_output(folder: SharedFolder, role: str) -> None:
    """Append standard output and error of this process, C libraries and children included, to `logs/<role>.log`.

    A log over MAX_BYTES is first moved to `<role>.log.1`, so a run that restarts often keeps two files per role. Where
    the folder is not shared the output stays with Ray, and `SharedFolder.check` says why.
    """
    log = folder.path / "logs" / f"{role}.log"
    if not (folder.path / MARK).exists():
        return
    log.parent.mkdir(exist_ok=True)
    if log.exists() and log.stat().st_size > MAX_BYTES:
        os.replace(log, log.with_name(log.name + ".1"))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    print(f"{START} {time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()} pid {os.getpid()}", flush=True)


def last_words(folder: SharedFolder, role: str) -> LastWords:
    """What the newest process of a role left in its log; empty where it left none."""
    log = folder.path / "logs" / f"{role}.log"
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_READ_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return LastWords("", (), log)
    lines = [line.rstrip() for line in text.rpartition(START)[2].splitlines()[1:] if line.strip()]
    errors = [match[0] for line in lines if (match := ERROR.search(line)) and not BY_PROXY.search(line)]
    return LastWords(errors[0][:MAX_ERROR_CHARACTERS] if errors else "", tuple(lines[-LAST_LINES:]), log)


@dataclass(frozen=True, slots=True)
class LastWords:
    """The end of a log."""

    error: str  # the first error in it, which is the cause of the later ones; "" where none is seen
    lines: tuple[str, ...]
    log: Path

    def after(self, reason: str) -> str:
        """One message: the process's own error first, then `reason`, then its last lines and where the rest is."""
        text = reason if not self.error or self.error in reason else f"{self.error}\n  ({reason})"
        if not self.lines:
            return text
        return "\n    ".join([f"{text}\n  last lines of {self.log}:", *self.lines])
