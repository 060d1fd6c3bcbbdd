"""Seeded damage: values, trees and bytes as no program writes them, and what may become of them.

A seed is one input, for ever: a failure names its seed, and `python -m pytest ... -k` runs it again. Whatever comes in,
the only outcomes are a result or one error of ours, in bounded time.
"""

from __future__ import annotations

import contextlib
import copy
import random
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from trainer.errors import StillhouseError

MAX_CPU_S = 60.0
MAX_MESSAGE = 20_000
MAX_SHOWN = 5

SCALARS: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e-9, 1e9, 1e300, -1e300, float("inf"), float("-inf"), float("nan")),
    *("", " ", "0", "1", "-1", "1e-4", "null", "none", "auto", "true", "a", "text", "kind", "messages", "user"),
    *(
        "x" * 300,
        "x" * 5000,
        "é漢🦌",
        "\u202e",
        "a\nb\tc\r",
        "\x1b[31m",
        "a\0b",
        "\ufeff",
        "\U0010ffff",
        "{{ 7*7 }}",
        "{% for x",
    ),
    *("../../x", "/", ".", "~", "~nosuchuser", "/dev/null", "/dev/zero", "a/b", "a/b/c", "a.b", "*.py", "${HOME}"),
]
PIECES = [b"\n", b"\0", b"\xff", b'"', b"{", b"[" * 50, b": ", b"\xef\xbb\xbf", b"\t", b"#", b"&a ", b"*a", b"!!x "]
KEYS = ["", "a", "kind", "path", "name", "x" * 300, "é", "0", "__class__", "dtype", "step", "id", "\n"]


class Damage:
    """Draws of one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, depth: int = 2) -> Any:
        """Anything JSON and YAML can name."""
        kind = self.random.random()
        if depth == 0 or kind < 0.7:
            return self.random.choice(SCALARS)
        if kind < 0.82:
            return [self.value(depth - 1) for _ in range(self.random.choice([0, 1, 2, 3, 40]))]
        if kind < 0.94:
            return {self.random.choice(KEYS): self.value(depth - 1) for _ in range(self.random.choice([0, 1, 3]))}
        nested: Any = self.random.choice(SCALARS)
        for _ in range(self.random.choice([5, 40, 200])):
            nested = [nested] if self.random.random() < 0.5 else {"a": nested}
        return nested

    def tree(self, tree: Any, *, most: int = 3) -> Any:
        """A copy with one to `most` places replaced, removed, added, doubled, wrapped, or put into others."""
        root = [copy.deepcopy(tree)]
        for _ in range(self.random.choice([1, 1, 1, most])):
            holder, key = self.random.choice(list(_places(root)))
            self._change(holder, key, [place for place in _places(root) if place[0] is not holder])
        return root[0]

    def _change(self, holder: Any, key: Any, others: list[tuple[Any, Any]]) -> None:
        match self.random.randrange(8):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[self.random.choice(KEYS)] = self.value()
            case 2 if isinstance(holder[key], list) and holder[key]:
                holder[key] = holder[key] * self.random.choice([0, 2, 20])
            case 3:
                holder[key] = self.random.choice([[holder[key]], {"a": holder[key]}, str(holder[key])])
            case 4 if others:
                there, name = self.random.choice(others)
                holder[key] = copy.deepcopy(there[name])
            case 5 if type(holder[key]) in (int, float):
                factor = self.random.choice([-1, 0, 0.5, 2, 1000, 10**12])
                holder[key] *= factor if abs(holder[key]) < 1e300 else int(factor)
            case _:
                holder[key] = self.value()

    def bytes(self, content: bytes, *, most: int = 4) -> bytes:
        """Bits flipped, pieces cut, doubled, moved, overwritten, and ends lost."""
        changed = bytearray(content)
        for _ in range(self.random.choice([1, 1, 1, most])):
            size = len(changed)
            at, length = self.random.randrange(size + 1), self.random.choice([1, 2, 8, 100, max(1, size // 3)])
            match self.random.randrange(7):
                case 0 if at < size:
                    changed[at] ^= 1 << self.random.randrange(8)
                case 1:
                    del changed[at : at + length]
                case 2:
                    changed[at:at] = changed[at : at + length] * self.random.choice([1, 3])
                case 3:
                    changed[at : at + length] = self.random.randbytes(min(length, 100))
                case 4:
                    del changed[at:]
                case 5:
                    changed[at:at] = self.random.choice(
                        [b"\n", b"\0", b"\xff", b'"', b"{", b"[" * 50, b": ", b"\xef\xbb\xbf"]
                    )
                case _:
                    changed[at : at + 1] = self.random.choice([b"9" * 30, b"-", b"1e999", b"null", b"\\ud800", b" "])
        return bytes(changed)


def _places(root: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value in a tree of lists and mappings."""
    items: Iterable[tuple[Any, Any]] = root.items() if isinstance(root, dict) else enumerate(root)
    for key, value in list(items):
        yield root, key
        if isinstance(value, dict | list):
            yield from _places(value)


class TookTooLong(BaseException):
    """Not an `Exception`, so that no border takes it for the answer of a library."""


@contextlib.contextmanager
def bounded_time(seconds: float = MAX_CPU_S) -> Iterator[None]:
    """Of this process on a processor, so that a busy machine changes nothing."""

    def stop(number: int, frame: object) -> None:
        raise TookTooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def outcomes(attempt: Callable[[int], object], seeds: Iterable[int]) -> dict[str, int]:
    """Run an input for each seed. How many ended how: `ok`, or the name of an error of ours. Fails with seeds and
    tracebacks where anything else came out, where a message is none for a person, or where it took too long."""
    counts: dict[str, int] = {}
    failures: list[str] = []
    for seed in seeds:
        try:
            with bounded_time():
                attempt(seed)
            ended = "ok"
        except StillhouseError as error:
            ended, text = type(error).__name__, str(error)
            if not text.strip() or len(text) > MAX_MESSAGE or "Traceback" in text:
                failures.append(f"seed {seed}: a message of {len(text)} characters: {text[:300]}")
        except (Exception, TookTooLong) as error:  # noqa: BLE001
            ended = type(error).__name__
            failures.append(f"seed {seed}: {''.join(traceback.format_exception(error))[-1500:]}")
        counts[ended] = counts.get(ended, 0) + 1
    assert not failures, f"{len(failures)} of {sum(counts.values())}\n" + "\n".join(failures[:MAX_SHOWN])
    return counts
