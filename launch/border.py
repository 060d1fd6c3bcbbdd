"""The border between the command and the system it runs on: its streams, the errors of files, and errors nobody
foresaw.

A file of its own because every command needs it, before anything heavy is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

from configs.errors import ConfigError, StillhouseError
from configs.secrets import without_secrets

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
PATH_ERRORS = (
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV, errno.EXDEV),
)
DEFECT = (
    "error: nobody foresaw this. It is a defect of Stillhouse or of a plug-in: please report it with the lines above"
)


class PatientText(io.TextIOWrapper):
    """A standard stream whose reader may leave (`| head`, a terminal that hangs up): what is written afterwards goes
    nowhere, and a run goes on."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._go_nowhere(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._go_nowhere(error)

    def _go_nowhere(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def prepare_streams() -> None:
    """Streams that take every text, whoever reads them: a character that the terminal's encoding lacks is written as
    its number; a stream that is closed is opened to nowhere, or the next file would get its number, and what is
    printed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
        if type(stream) is io.TextIOWrapper:
            options = {"encoding": stream.encoding, "line_buffering": stream.line_buffering or number == 2}
            setattr(sys, name, PatientText(stream.detach(), errors="backslashreplace", **options))


class ProcessEnd:
    """Ends the process after its exit handlers and before the interpreter is torn down.

    A daemon thread that is inside native code by then (a teacher that still generates for a run that has failed) would
    be unwound through C++, which aborts the process: exit code -6 in place of the run's own. Registered before
    everything else, so that it runs after every other exit handler; threads that are not daemons have been joined.
    """

    def __init__(self) -> None:
        self._code: int | None = None
        atexit.register(self._leave)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, the code that the process is told to end with is kept. Without one (an interrupt, a defect) Python
        ends the process as it always does."""
        try:
            yield
        except SystemExit as told:
            if told.code is None or isinstance(told.code, int):
                self._code = (told.code or 0) & 0xFF
            raise

    def _leave(self) -> None:
        if self._code is None:
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # a full disk, a closed stream: Python tells, and ends with 120
            return
        os._exit(self._code)


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Inside, what the system says about a file becomes one message: `ConfigError` for a path that cannot be used,
    `InfrastructureError` for a disk that is full or away. Anything else passes."""
    from trainer.errors import InfrastructureError

    try:
        yield
    except OSError as error:
        place = error.filename if error.filename is not None else "a file"
        if error.errno in DISK_ERRORS:
            raise InfrastructureError(f"{_shown(place)} cannot be written or read: {error.strerror}") from error
        if error.errno in PATH_ERRORS:
            raise ConfigError(f"{_shown(place)} cannot be used: {error.strerror}") from error
        raise


def tell_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`: the traceback without secrets, and whose turn it is."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(without_secrets(text, environment=os.environ), end="", file=sys.stderr)
    if not isinstance(error, StillhouseError | KeyboardInterrupt):
        print(DEFECT, file=sys.stderr)


def _shown(place: object) -> str:
    text = os.fsdecode(place) if isinstance(place, str | bytes) else str(place)
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"
