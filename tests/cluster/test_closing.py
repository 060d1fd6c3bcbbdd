"""The end of a run: every wait in it ends, whatever the roles do."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import ray

from cluster.lifecycle.calls import answer
from cluster.session import close_all


@pytest.mark.parametrize("turns", range(5))
def test_a_cancelled_wait_ends_cancelled_even_where_the_answer_comes_at_that_moment(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """A watcher that a cancellation does not end pings for ever, and the run waits for it for ever."""
    monkeypatch.setattr(ray, "cancel", lambda ref: None)

    async def scenario() -> None:
        call: Future[int] = Future()
        waiting = asyncio.create_task(answer(SimpleNamespace(future=lambda: call), 5.0))
        await asyncio.sleep(0.01)
        call.set_result(1)
        for _ in range(turns):  # of the loop: the answer is on its way through it
            await asyncio.sleep(0)
        if not waiting.done():
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(scenario())


def test_a_call_that_timed_out_by_itself_is_no_missed_deadline() -> None:
    async def scenario() -> None:
        call: Future[int] = Future()
        call.set_exception(TimeoutError("of the call"))
        await answer(SimpleNamespace(future=lambda: call), 5.0)

    with pytest.raises(TimeoutError, match="of the call"):
        asyncio.run(scenario())


async def ends() -> None:
    await asyncio.sleep(0.01)


async def never_ends() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise ValueError("a defect of the role")


def test_a_role_that_does_not_stop_is_named_and_given_up() -> None:
    said: list[str] = []
    started = time.monotonic()
    closing = {"students": ends(), "generators": never_ends(), "scorers": never_ends()}
    asyncio.run(close_all(closing, note=said.append, timeout_s=0.2))
    assert time.monotonic() - started < 5.0
    assert len(said) == 1
    assert said[0].startswith("generators, scorers did not stop within 0 s")


def test_an_error_of_one_role_does_not_leave_the_others_running() -> None:
    ended: list[str] = []

    async def slow() -> None:
        await asyncio.sleep(0.05)
        ended.append("students")

    with pytest.raises(ValueError, match="a defect of the role"):
        asyncio.run(close_all({"students": slow(), "scorers": fails()}, note=ended.append))
    assert ended == ["students"]
