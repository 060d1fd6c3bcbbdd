"""Blocking work beside an event loop, in threads that keep no process alive."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def in_thread(function: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result:
    """What the function returns or raises, always as an `Exception`, from a daemon thread of its own.

    Not `asyncio.to_thread`: a thread of its pool that waits for a dead file server is waited for when the process ends,
    for ever. Whoever is cancelled here leaves the thread behind, which may still change what it was given.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Result] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if answer.cancelled():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments, **keywords)
        except BaseException as raised:  # noqa: BLE001 - it is raised where it is awaited
            error = (
                raised if isinstance(raised, Exception) and not isinstance(raised, StopIteration) else wrapped(raised)
            )
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True, name=getattr(function, "__qualname__", "work")).start()
    return await answer


def wrapped(raised: BaseException) -> RuntimeError:
    """For what a future cannot hold (StopIteration), and for what nobody expects from it: panics of Rust code."""
    error = RuntimeError(f"{type(raised).__name__}: {raised}")
    error.__cause__ = raised
    return error


def within(
    seconds: float, function: Callable[[], Result], *, doing: str, alive: Callable[[], float] | None = None
) -> Result:
    """What the function returns or raises, from a daemon thread. Raises `TimeoutError` after that many seconds without
    an answer; with `alive`, which tells by `time.monotonic` when there was progress last, that many after it. The
    thread is left behind then."""
    answer: list[tuple[Result | None, BaseException | None]] = []
    done = threading.Event()

    def work() -> None:
        try:
            answer.append((function(), None))
        except BaseException as raised:  # noqa: BLE001 - it is raised where it is waited for
            answer.append((None, raised))
        done.set()

    threading.Thread(target=work, daemon=True, name=doing).start()
    began = time.monotonic()
    while not done.wait(min(1.0, seconds)):
        last = began if alive is None else max(began, alive())
        if time.monotonic() - last > seconds:
            raise TimeoutError(f"{doing}: no answer within {seconds:g} s")
    result, error = answer[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
