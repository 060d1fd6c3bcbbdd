"""A finding: one line of `doctor` and `check`. Questions have a deadline; one that hangs is a finding too."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from trainer.errors import ConfigError, StillhouseError

Status = Literal["ok", "warning", "problem", "not checked"]
T = TypeVar("T")

LOOK_TIMEOUT_S = 15.0
"""For one question to one machine. A file system or a name server that hangs is itself a finding."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one thing, and what to do where it is not well."""

    status: Status
    subject: str
    text: str
    advice: str = ""
    exit_code: int = 0  # of a problem that ends a run

    @property
    def fatal(self) -> bool:
        """Whether a run must not start."""
        return self.status == "problem"

    @property
    def message(self) -> str:
        """What is wrong and what to do, where nothing else says of what."""
        return f"{self.text}; {self.advice}" if self.advice else self.text

    def __str__(self) -> str:
        return f"{self.subject}: {self.message}"


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warning(subject: str, text: str, advice: str = "") -> Finding:
    return Finding("warning", subject, text, advice)


def problem(subject: str, text: str, advice: str = "") -> Finding:
    return Finding("problem", subject, text, advice, ConfigError.exit_code)


def attempt(subject: str, look: Callable[[], object], say: Callable[[], str]) -> Finding:
    """`say()` where `look` raises nothing, else its error as a problem."""
    try:
        look()
    except StillhouseError as error:
        return replace(problem(subject, str(error)), exit_code=error.exit_code)
    except ValueError as error:
        return problem(subject, f"{subject}: {error}")
    return ok(subject, say())


@dataclass(frozen=True, slots=True)
class Look:
    """One question about this machine."""

    subject: str
    ask: Callable[[], Finding]


def examine(looks: Iterable[Look], *, timeout_s: float = LOOK_TIMEOUT_S) -> Iterator[Finding]:
    """The findings of all looks, in order; one that takes too long or breaks is a problem and hides no other."""
    for look in looks:
        try:
            yield from bounded((one.ask() for one in (look,)), first_s=timeout_s, then_s=timeout_s)
        except Silence:
            advice = "a file server or name server does not answer: ask who runs it"
            yield problem(look.subject, f"no answer within {timeout_s:.0f} s", advice)
        except (OSError, ValueError, RuntimeError) as error:
            text = f"cannot be looked at: {type(error).__name__}: {error}"
            yield problem(look.subject, text, "mend what the message names")


class Silence(Exception):
    """Nothing came in time."""


def bounded(items: Iterator[T], *, first_s: float, then_s: float) -> Iterator[T]:
    """The items as they come; raises `Silence` where the first, or then the next, takes longer.

    They are made in a daemon thread: one that waits for a dead file server cannot be ended, and does not keep the
    process.
    """
    made: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue()

    def make() -> None:
        try:
            for item in items:
                made.put((True, item))
        except BaseException as error:  # noqa: BLE001 - raised again where the items are read
            made.put((False, error))
        else:
            made.put((False, None))

    threading.Thread(target=make, daemon=True).start()
    timeout_s = first_s
    while True:
        try:
            is_item, found = made.get(timeout=timeout_s)
        except queue.Empty:
            raise Silence(f"no answer for {timeout_s:.0f} s") from None
        if not is_item:
            if found is not None:
                raise found
            return
        yield found
        timeout_s = then_s
