"""Base classes of user-facing errors, and `foreign_errors`, which turns exceptions of libraries into them.

They are here because `configs` is the lowest layer; `trainer/errors.py` offers them together with all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_REASON = 400


class StillhouseError(Exception):
    """An error meant for a person: its text is shown without a traceback. `exit_code` is what the command returns."""

    exit_code = 1


class ConfigError(StillhouseError):
    """The configuration, a model folder or the machine does not allow the run; nothing was started."""

    exit_code = 2


@contextmanager
def foreign_errors(doing: str, *, error: type[StillhouseError] = ConfigError, hint: str = "") -> Iterator[None]:
    """Around a library call on user input: any exception inside becomes an `error`, "<doing>: <reason>; <hint>", with
    the original as its cause.

    Libraries raise any type of exception on bad files (tokenizers even a Rust panic, which is no `Exception`), so no
    list of types is complete. `StillhouseError`, interrupts and cancellations pass unchanged. Wrap the library call
    alone: a bug of ours inside would be reported as bad input.
    """
    try:
        yield
    except StillhouseError:
        raise
    except Exception as cause:
        raise error(_sentence(doing, cause, hint)) from cause
    except BaseException as cause:
        if type(cause).__name__ != "PanicException":
            raise
        raise error(_sentence(doing, cause, hint)) from cause


_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and movements of a terminal
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # its title, its clipboard
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def without_controls(text: str) -> str:
    """Untrusted text, safe to print: without terminal control sequences. Line breaks and tabs stay."""
    return _CONTROLS.sub("", text)


def reason_of(cause: BaseException) -> str:
    """The message of an exception on one line, without control characters, truncated; with the name of its type where
    the message alone says too little (`KeyError: 'x'`)."""
    text = " ".join(without_controls(str(cause)).split())
    if len(text) > _LONGEST_REASON:
        text = text[:_LONGEST_REASON] + " ..."
    speaks = isinstance(cause, (OSError, ValueError)) and len(text.split()) > 2
    return text if speaks else ": ".join(part for part in (type(cause).__name__, text) if part)


def _sentence(doing: str, cause: BaseException, hint: str) -> str:
    return f"{doing}: {reason_of(cause)}" + (f"; {hint}" if hint else "")
