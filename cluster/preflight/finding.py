"""One line of the doctor, and how a look that hangs becomes one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]

LOOK_TIMEOUT_S = 15.0
"""For one look at one machine. A file system or a name server that hangs is itself a finding."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one thing, and what to do where it is not well."""

    status: Status
    subject: str
    text: str
    advice: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warning(subject: str, text: str, advice: str) -> Finding:
    return Finding("warning", subject, text, advice)


def problem(subject: str, text: str, advice: str) -> Finding:
    return Finding("problem", subject, text, advice)


@dataclass(frozen=True, slots=True)
class Look:
    """One thing to look at."""

    subject: str
    ask: Callable[[], Finding | list[Finding]]


def examine(looks: Iterable[Look], *, timeout_s: float = LOOK_TIMEOUT_S) -> Iterator[Finding]:
    """The findings of all looks, in order; one that takes too long or breaks is a problem and hides no other."""
    for look in looks:
        yield from _bounded(look, timeout_s)


def _bounded(look: Look, timeout_s: float) -> list[Finding]:
    answers: list[Finding | list[Finding]] = []

    def ask() -> None:
        try:
            answers.append(look.ask())
        except (OSError, ValueError, RuntimeError) as error:
            text = f"cannot be looked at: {type(error).__name__}: {error}"
            answers.append(problem(look.subject, text, "mend what the message names"))

    # A thread that waits for a dead file server cannot be ended: a daemon one does not keep the process either.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not answers:
        advice = "a file server or name server does not answer: ask who runs it"
        return [problem(look.subject, f"no answer within {timeout_s:.0f} s", advice)]
    return answers[0] if isinstance(answers[0], list) else [answers[0]]
