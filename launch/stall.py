"""A run without progress is ended: what it waits for is written down, what was trained is saved, exit code 4.

    RunObserver.work counts finished pieces of work   --watched by a thread-->   unchanged for `timeout_s`:
    stall.txt  ->  ask the run to stop, which saves  ->  cancel it  ->  end the process

Every call of a run has its deadline, so this is for the unexpected: a task that died silently, a disk that does not
answer. The thread counts its own ticks, not hours: a process that was stopped, or slept with its machine, is no stall.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.schema import Faults
from launch.report.observer import RunObserver
from launch.stopping import StopRequest
from trainer.errors import InfrastructureError, StillhouseError

TICKS = 50  # in a timeout
TAKEN_UP_S = 30.0  # for an event loop to run a callback: longer, and it is blocked
SAVE_GRACE_S = 30.0  # for a run that was asked to stop, beside what a checkpoint may take
CLOSE_S = 180.0  # for a cancelled run to end: more than its roles may take
WRITE_S = 10.0  # for stall.txt: the disk may be what does not answer


def stall_timeout_s(faults: Faults, *, start_timeout_s: float) -> float:
    """As configured, or so long that every deadline after which the run helps itself comes first."""
    if faults.stall_timeout_s is not None:
        return faults.stall_timeout_s
    scored = faults.max_unit_attempts * faults.score_timeout_s
    return faults.room_timeout_s + start_timeout_s + faults.step_timeout_s + scored


class Stalled(InfrastructureError):
    """A run that got no further was ended."""


class StallWatch:
    """Watches one run: `with` it around `asyncio.run`, and `over` inside. What delays the loop's end after the run,
    such as threads that wait for a dead file server, has as much time as a run that was cancelled."""

    def __init__(
        self,
        observer: RunObserver,
        *,
        timeout_s: float,
        save_s: float,
        file: Path,
        ended: Callable[[int, str], None],
        tell: Callable[[int, str], None],
    ) -> None:
        """`save_s`: how long a checkpoint may take. `ended(code, reason)` records the end of a run whose process is
        ended from here; `tell` says it to people, and returns in bounded time by itself."""
        self._observer = observer
        self._timeout_s = timeout_s
        self._save_s = save_s
        self._file = file
        self._ended = ended
        self._tell = tell
        self._over = threading.Event()
        self._gone = threading.Event()
        self._taken_up = threading.Event()
        self.reason: str | None = None  # why the run was ended here

    def __enter__(self) -> StallWatch:
        return self

    def __exit__(self, *error: object) -> None:
        self._gone.set()

    @contextmanager
    def over(self, stop: StopRequest) -> Iterator[None]:
        """Inside, the current task is watched; a stall ends it with `Stalled`."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        threading.Thread(target=self._watch, args=(loop, task, stop), daemon=True, name="stall-watch").start()
        try:
            yield
        except (StillhouseError, asyncio.CancelledError) as error:
            if self.reason is None:
                raise
            raise Stalled(f"{self.reason}. {str(error) or 'It had to be cancelled'}") from None
        finally:
            self._over.set()

    def _watch(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], stop: StopRequest) -> None:
        if self._stalls():
            self._end_run(loop, task, stop)
        if not self._over.is_set() or not self._gone.wait(CLOSE_S):
            self._end_process()

    def _end_run(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], stop: StopRequest) -> None:
        self.reason = (
            f"nothing was scored, trained or saved for {self._timeout_s:.0f} s (faults.stall_timeout_s): what the run "
            f"was waiting for is in {self._file}"
        )
        text = f"{self.reason}\n\n{state_of(loop, self._observer)}"
        if not _within(WRITE_S, lambda: self._file.write_text(text)):
            print(text, file=sys.stderr, flush=True)

        def ask() -> None:
            self._taken_up.set()
            stop.ask("a stall")

        if self._run_in(loop, ask) and not self._over.wait(self._save_s):
            self._run_in(loop, task.cancel)
            self._over.wait(CLOSE_S)

    def _stalls(self) -> bool:
        """True once nothing has happened for as long as allowed, False when the run is over."""
        tick_s, seen, idle = self._timeout_s / TICKS, self._observer.work, 0
        while not self._over.wait(tick_s):
            idle = idle + 1 if self._observer.work == seen else 0
            seen = self._observer.work
            if idle >= TICKS:
                return True
        return False

    def _run_in(self, loop: asyncio.AbstractEventLoop, what: Callable[[], object]) -> bool:
        """Whether the loop has run it."""
        try:
            loop.call_soon_threadsafe(what)
        except RuntimeError:  # it is closed
            return False
        return self._taken_up.wait(TAKEN_UP_S)

    def _end_process(self) -> None:
        """For a main thread that does not return: Ray, or the guard process, ends what it has started."""
        code = InfrastructureError.exit_code
        reason = self.reason or f"the run was over, and threads of its process did not end within {CLOSE_S:.0f} s"
        print(f"error: {reason}. The process is ended from outside of its loop", file=sys.stderr, flush=True)
        _within(WRITE_S, lambda: self._ended(code, reason))
        self._tell(code, reason)
        os._exit(code)


def state_of(loop: asyncio.AbstractEventLoop, observer: RunObserver) -> str:
    """What each role did last, where every task of the loop waits, and where every thread is."""
    now = time.time()
    last = [f"  {lane}: {what}, {now - at:.0f} s ago" for lane, (what, at) in sorted(observer.last.items())]
    tasks = [f"  {task.get_name()}\n{_awaits(task)}" for task in _tasks(loop)]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    threads = [
        f"  {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    ]
    return "\n".join(["finished last:", *last, "", "tasks:", *tasks, "", "threads:", *threads, ""])


def _tasks(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    """All tasks of a loop, asked from another thread: the set may change meanwhile."""
    for _ in range(100):
        try:
            return sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
        except RuntimeError:
            time.sleep(0.01)
    return []


def _awaits(task: asyncio.Task[Any]) -> str:
    """Where a task waits, from the outermost coroutine inwards."""
    lines, coroutine = [], task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        lines.append(f"    {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}")
        coroutine = getattr(coroutine, "cr_await", None)
    return "\n".join(lines)


def _within(seconds: float, work: Callable[[], object]) -> bool:
    """Whether it was done in time and without an error of the disk."""
    done = threading.Event()

    def attempt() -> None:
        try:
            work()
        except OSError:
            return
        done.set()

    threading.Thread(target=attempt, daemon=True).start()
    return done.wait(seconds)
