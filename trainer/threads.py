"""Blocking work beside an event loop, in threads that keep no process alive."""

from __future__ import annotations

import asyncio
import threading
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
