"""Calls of Ray actors from asyncio: each has a deadline, and errors are the application's own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from trainer.errors import DeadlineExceeded


async def answer(ref: Any, timeout_s: float) -> Any:
    """The value of an object reference, or DeadlineExceeded. A cancelled wait cancels the call."""
    future = asyncio.wrap_future(ref.future())
    try:
        # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that meets the answer, and the task goes on.
        async with asyncio.timeout(timeout_s) as limit:
            return await future
    except TimeoutError:
        if not limit.expired():  # the call itself raised it
            raise
        if future.done() and not future.cancelled():  # it was there in time, and this loop was busy
            return future.result()
        ray.cancel(ref)
        raise DeadlineExceeded(f"no answer after {timeout_s:.0f} s") from None
    except asyncio.CancelledError:
        ray.cancel(ref)
        raise


async def answers(refs: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """The value of each reference, or a text that says why there is none."""
    found = await asyncio.gather(*(answer(ref, timeout_s) for ref in refs.values()), return_exceptions=True)
    return dict(zip(refs, map(_or_why_not, found), strict=True))


def _or_why_not(result: Any) -> Any:
    if isinstance(result, DeadlineExceeded):
        return str(result)
    if isinstance(result, RayError):
        cause = unwrap(result)
        return " ".join(f"{type(cause).__name__}: {cause}".split())[-400:]
    if isinstance(result, BaseException):
        raise result
    return result


def unwrap(error: BaseException) -> BaseException:
    """The application's own error behind what Ray raises for a failed call."""
    return error.cause if isinstance(error, RayTaskError) else error


def brief(error: BaseException) -> str:
    """One line of an error for events and messages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
