"""The root of all errors meant for a person, the one that configuration raises, and the border to other libraries.
A file here because `configs` is the lowest layer; `trainer/errors.py` offers these together with all others."""

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
    """The border to a library that is given input of a user's: inside, whatever it raises becomes one `error`,
    "<doing>: <reason>; <hint>", with the original as its cause.

    Libraries refuse bad files with any type of exception (tokenizers even with a panic of Rust code, which is no
    `Exception`), so a list of types is never complete. Errors of ours, interrupts and cancellations pass unchanged.
    Keep the block to the library's call: a mistake of our own inside would be blamed on the input.
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
    """Text from elsewhere as it may be shown: a terminal obeys control sequences, whoever wrote them. Line breaks and
    tabs stay."""
    return _CONTROLS.sub("", text)


def reason_of(cause: BaseException) -> str:
    """One line that says why: the message without control characters and line breaks, cut where it would drown the
    rest; the type's name where there is no message or where the message alone says nothing (`KeyError: 'x'`)."""
    text = " ".join(without_controls(str(cause)).split())
    if len(text) > _LONGEST_REASON:
        text = text[:_LONGEST_REASON] + " ..."
    speaks = isinstance(cause, (OSError, ValueError)) and len(text.split()) > 2
    return text if speaks else ": ".join(part for part in (type(cause).__name__, text) if part)


def _sentence(doing: str, cause: BaseException, hint: str) -> str:
    return f"{doing}: {reason_of(cause)}" + (f"; {hint}" if hint else "")
