"""A `stillhouse` command in a process of its own, whose lines and errors come to the process that called it.

caller  --starts-->  python -m launch COMMAND ...   in a session of its own: a notebook's interrupt, which goes to
                                                    the whole group of the kernel, reaches the caller alone
lines of both streams  --reader thread, queue-->  log(line)
interrupt: SIGINT once to the command, which saves and ends; again: it ends at once; again: it is killed
end: exit code and what the command noted in a file -> nothing, or the exception
the caller is killed: the kernel sends the command SIGTERM (launch/process.py, end_with_parent)
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer import errors
from trainer.errors import ConfigError, StillhouseError
from trainer.records import read_record
from trainer.run_folder import Ending

Log = Callable[[str], object]
"""Gets a line without its end."""

_ERRORS = {
    kind.exit_code: kind
    for kind in (ConfigError, errors.DataError, errors.InfrastructureError, errors.Diverged, errors.Preempted)
}
_INTERRUPTED = (errors.Preempted.exit_code, 130, -signal.SIGINT, 128 + signal.SIGINT)
_TAIL = 30  # lines, of a command that does not say why it ended
_POLL_S = 0.2
_LEFT_OPEN_S = 5.0  # for the streams of a command that has ended: what it left running may hold them
_END_S = 120.0  # for a command that is ended because the caller fails


def run_command(arguments: Sequence[str], *, log: Log, public: Callable[[str], str] = lambda text: text) -> None:
    """Run `stillhouse ARGUMENTS` to its end. Every line, and the message of an error, goes through `public` first.

    Raises the error that its exit code stands for with what it says of itself, `KeyboardInterrupt` where an interrupt
    ended it, and `StillhouseError` with its last lines for an end that it did not expect itself.
    """
    tail: deque[str] = deque(maxlen=_TAIL)

    def tell(line: str) -> None:
        tail.append(public(line))
        log(tail[-1])

    with tempfile.TemporaryDirectory(prefix="stillhouse-", ignore_cleanup_errors=True) as folder:
        ending = Path(folder) / "exit.json"
        notes = ["--ending", str(ending)] if arguments[0] == "train" else []
        command = _Command([*arguments, *notes, "--parent", str(os.getpid())])
        try:
            code = command.follow(tell)
        finally:
            command.end()
        reason = _reason(ending)
    if code == 0:
        return
    if command.interrupts and code in _INTERRUPTED:
        raise KeyboardInterrupt
    if code in _ERRORS:
        raise _ERRORS[code](public(reason) or _problems(tail))
    raise StillhouseError(f"stillhouse {arguments[0]} ended with exit code {code}:\n" + "\n".join(tail))


class _Command:
    """One command, from its start on."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.interrupts = 0
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "launch", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="stillhouse-lines").start()

    def follow(self, tell: Log) -> int:
        """Until it has ended; returns its exit code. Interrupts of this process are passed on."""
        while True:
            try:
                while (line := self._next()) is not None:
                    tell(line)
                return self._process.wait()
            except KeyboardInterrupt:
                self.interrupts += 1
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGINT if self.interrupts < 3 else signal.SIGKILL)

    def end(self) -> None:
        """Nothing is left running, whatever happened to the caller."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\r\n"))
        self._lines.put(None)

    def _next(self) -> str | None:
        """None after the last one."""
        idle_s = 0.0
        while idle_s < _LEFT_OPEN_S:
            try:
                return self._lines.get(timeout=_POLL_S)
            except queue.Empty:
                idle_s = idle_s + _POLL_S if self._process.poll() is not None else 0.0
        return None


def _reason(ending: Path) -> str:
    try:
        return read_record(ending, Ending).reason
    except (OSError, StillhouseError):
        return ""


def _problems(lines: Sequence[str]) -> str:
    """What a command without a note said of what is wrong."""
    said: list[str] = []
    goes_on = False
    for line in lines:
        begins = re.match(r"(error: |problem +)", line)
        goes_on = begins is not None or (goes_on and line.startswith(" "))
        said += [line[begins.end() if begins else 0 :]] if goes_on else []
    return "\n".join(said or lines)
