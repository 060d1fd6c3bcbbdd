"""Why an engine does not start, as one message: a model or a setting that it refuses is a `ConfigError`, a machine that
fails an `InfrastructureError`. Engines raise any type of exception for either, so both are told by type and text."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.errors import ConfigError, InfrastructureError, StillhouseError, reason_of

OF_A_MACHINE = re.compile(
    r"\b(CUDA|cuda|NCCL|HIP|cuDNN|[Gg]loo|driver)\b|out of memory|OutOfMemory|Free memory on device|MemoryError"
    r"|Dist(Backend|Network|Store)Error|Connection|[Tt]imed out|TimeoutError|[Aa]ddress already in use|BrokenPipe"
    r"|No space left|[Bb]usy|shared object|shared memory|[Bb]us error|[Ss]egmentation|Killed|EOFError"
    r"|\[Errno (?!(?:2|13|20|21)\])"
)
"""In an error that another start, or another machine, may not have. Errno 2, 13, 20 and 21 are of wrong paths."""

BY_PROXY = re.compile(r"root cause|Engine core init|EngineDeadError|background process|CancelledError", re.IGNORECASE)
"""Errors of vLLM that only say that another process had one."""

_OF_A_PATH = (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def start_errors(doing: str, *, hint: str = "") -> Iterator[None]:
    """Around the start of an engine: whatever is raised becomes "<doing>: <reason>; <hint>", of the type that is due.
    Errors of ours pass unchanged. The hint is for those of the configuration alone."""
    try:
        yield
    except StillhouseError:
        raise
    except Exception as cause:
        if is_a_machines_fault(cause):
            raise InfrastructureError(f"{doing}: {said(cause)}") from cause
        raise ConfigError(f"{doing}: {said(cause)}" + (f"; {hint}" if hint else "")) from cause


def is_a_machines_fault(cause: BaseException) -> bool:
    """Also of an error that only points to one in another process: nothing is known of that here."""
    if isinstance(cause, OSError) and cause.errno is not None:
        return cause.errno not in _OF_A_PATH
    text = f"{' '.join(kind.__name__ for kind in type(cause).__mro__)}: {cause}"
    return OF_A_MACHINE.search(text) is not None or BY_PROXY.search(str(cause)) is not None


def said(cause: BaseException) -> str:
    """The reason in one line; of pydantic's validation errors what they say, without the arguments they judged."""
    judged: Any = getattr(cause, "errors", None)
    if type(cause).__name__ != "ValidationError" or not callable(judged):
        return reason_of(cause)
    return "; ".join(str(one["msg"]).removeprefix("Value error, ") for one in judged())


def start_failure(text: str, *, cause: BaseException, logged: str) -> StillhouseError:
    """What a replica that did not start raises in the end. `logged` is the first error in the log of its process, which
    decides where `cause` only points to another process."""
    points = BY_PROXY.search(str(cause)) is not None
    if points and logged and OF_A_MACHINE.search(logged) is None and BY_PROXY.search(logged) is None:
        return ConfigError(text)
    return InfrastructureError(text)
