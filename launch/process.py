"""The process of a command: its standard streams, errors of the operating system, unexpected exceptions, and its exit.

Every command needs this before anything heavy is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import TracebackType

from configs.errors import ConfigError, StillhouseError
from configs.secrets import without_secrets

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""Of a file anywhere. Other numbers of OSError are wrong paths, timeouts and broken connections."""
PATH_ERRORS = (
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV, errno.EXDEV),
)
DEFECT = (
    "error: this was not expected. It is a defect of Stillhouse or of a plug-in: please report it with the lines above"
)


class StandardStream(io.TextIOWrapper):
    """stdout or stderr whose reader may leave (`| head`, a terminal that hangs up): later output is discarded, and a
    run goes on."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        _redirect_to_null([self.fileno()])


_TERMINALS = tuple(number for number in (1, 2) if os.isatty(number))


def leave_dead_terminal() -> None:
    """Discard what is written to a terminal that is gone; it would raise OSError."""
    _redirect_to_null([number for number in _TERMINALS if not os.isatty(number)])


def _redirect_to_null(descriptors: Sequence[int]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for number in descriptors:
        os.dup2(null, number)
    os.close(null)


def prepare_streams() -> None:
    """Make stdout and stderr take every text: a character that the terminal's encoding lacks is written as its number.
    A standard stream that is closed is opened to /dev/null: the next file would get its number, and the output."""
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
            setattr(sys, name, StandardStream(stream.detach(), errors="backslashreplace", **options))


class ProcessEnd:
    """Ends the process after its exit handlers and before the interpreter is torn down.

    A daemon thread that is inside native code by then (a teacher that still generates for a run that has failed) would
    be unwound through C++, which aborts the process: exit code -6 in place of the run's own. Registered first, so that
    it runs after every other exit handler; threads that are not daemons have been joined.
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
        except (OSError, ValueError):  # a full disk, a closed stream: Python reports it, and exits with 120
            return
        os._exit(self._code)


_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def end_with_parent(parent: int | None) -> None:
    """From now on the kernel sends this process SIGTERM when `parent`, which started it, ends without having ended it:
    a notebook's kernel that is killed leaves no run behind. None: nobody is meant."""
    if parent is not None:
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Inside, an OSError about a file becomes one message: `ConfigError` for a path that cannot be used,
    `InfrastructureError` for a disk that is full or unavailable. Any other error passes."""
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
    """For `sys.excepthook`: the traceback without secrets, and that it should be reported."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(without_secrets(text, environment=os.environ), end="", file=sys.stderr)
    if not isinstance(error, StillhouseError | KeyboardInterrupt):
        print(DEFECT, file=sys.stderr)


def _shown(place: object) -> str:
    text = os.fsdecode(place) if isinstance(place, str | bytes) else str(place)
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"
