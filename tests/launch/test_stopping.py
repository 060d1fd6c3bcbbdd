"""Signals and notices: what stops after the step, what stops at once, and with which exit code."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import pytest

from launch import stopping
from launch.stopping import StopRequest, preemptible
from trainer.errors import Preempted


class Notes:
    """A watch that remembers what it was told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, name: str, **fields: Any) -> None:
        self.texts.append(fields["text"])


def run(work: Callable[[StopRequest], Any], *, can_wait: bool) -> Notes:
    """`work` as the main task of a run that may be stopped."""
    notes = Notes()

    async def main() -> None:
        stop = StopRequest(notes)
        with stop.on_signals(can_wait=lambda: can_wait):
            try:
                await work(stop)
            except asyncio.CancelledError:
                stop.explain()
                raise
            finally:
                stop.leave()

    asyncio.run(main())
    return notes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_steps_are_trained_only_asks(number: signal.Signals) -> None:
    async def work(stop: StopRequest) -> None:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.requested.wait(), 5)

    before = signal.getsignal(number)
    notes = run(work, can_wait=True)
    assert number.name in notes.texts[0]
    assert "with a checkpoint" in notes.texts[0]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("number", "raised"),
    [
        (signal.SIGTERM, Preempted),
        (signal.SIGUSR1, Preempted),
        (signal.SIGHUP, Preempted),
        (signal.SIGINT, asyncio.CancelledError),
    ],
)
def test_a_signal_while_nothing_is_trained_ends_the_run_at_once(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    async def work(stop: StopRequest) -> None:
        os.kill(os.getpid(), number)
        await asyncio.sleep(30)

    started = time.monotonic()
    with pytest.raises(raised):
        run(work, can_wait=False)
    assert time.monotonic() - started < 5


def test_signals_of_several_kinds_or_in_pairs_leave_the_checkpoint_its_time() -> None:
    async def work(stop: StopRequest) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.01)
        stop.ask("node n3 will be taken away")
        stop.ask("node n3 will be taken away")

    run(work, can_wait=True)


def test_the_same_signal_once_more_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "REPEATED_S", 0.05)

    async def work(stop: StopRequest) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(30)

    with pytest.raises((asyncio.CancelledError, KeyboardInterrupt)):
        run(work, can_wait=True)


def test_a_watcher_may_stop_the_run_and_ends_with_it() -> None:
    ended = []

    async def work(stop: StopRequest) -> None:
        async def notices() -> None:
            try:
                stop.ask("node n3 will be taken away in 12 s, with student-0")
                await asyncio.sleep(30)
            finally:
                ended.append(True)

        stop.watch(notices())
        await asyncio.sleep(30)

    with pytest.raises(Preempted, match="node n3 will be taken away in 12 s"):
        run(work, can_wait=False)
    assert ended == [True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_before_and_after_the_loops_a_scheduler_ends_the_run_in_order(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def killed() -> None:
        with preemptible():
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(Preempted, match=f"stopped by {number.name}"):
        killed()
    assert signal.getsignal(number) == before


def test_under_nohup_the_end_of_the_terminal_is_not_heard() -> None:
    async def work(stop: StopRequest) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.1)
        assert not stop.requested.is_set()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert run(work, can_wait=True).texts == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_watcher_that_fails_is_told() -> None:
    async def work(stop: StopRequest) -> None:
        async def notices() -> None:
            raise TypeError("a bug in the watcher")

        stop.watch(notices())
        await asyncio.sleep(0.05)

    assert "TypeError('a bug in the watcher')" in run(work, can_wait=True).texts[0]


CLOSED = """
import os, signal, sys
from launch.stopping import preemptible
from trainer.errors import Preempted
from launch.report.progress import Progress

try:
    with preemptible(), Progress(3) as progress:
        progress.phase("waiting")
        print("ready", flush=True)
        signal.pause()
except Preempted as error:
    progress.note("still here")
    print(error, flush=True)
    print(error, file=sys.stderr, flush=True)
    os._exit(75)
"""


def test_a_terminal_that_is_closed_takes_nothing_with_it() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    said = b""
    while b"ready" not in said:
        said += os.read(master, 4096)
    os.close(master)
    assert process.wait(timeout=60) == 75
