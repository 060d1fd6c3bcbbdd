"""How a run is asked to stop, by signals and by preemption notices, and what follows.

while steps are trained    the step ends, a checkpoint is saved, exit 75
at any other time          nothing would be saved that is not, so it ends at once: exit 75, or 130 for Ctrl-C
the same signal again      at once, exit 130
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from launch.process import leave_dead_terminal
from launch.report.observer import RunObserver
from trainer.errors import Preempted

SCHEDULED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""From a scheduler, or from a terminal that is closed: the run is resumed later."""
SIGNALS = (*SCHEDULED, signal.SIGINT)
SIGNAL_NAMES = tuple(number.name for number in SIGNALS)
REPEATED_S = 1.0


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Outside of the loops, a scheduler's signal ends the run in order: `Preempted` where the run is just then."""

    def stop(number: int, frame: object) -> None:
        leave_dead_terminal()
        raise Preempted(
            f"stopped by {signal.Signals(number).name} while no step was trained; run the same command again to go on"
        )

    before = {number: signal.signal(number, stop) for number in handled(SCHEDULED)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def handled(signals: Sequence[signal.Signals]) -> list[signal.Signals]:
    """Without SIGHUP where the process was started with it ignored: under `nohup` a run outlives its terminal."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in signals if not (ignored and number == signal.SIGHUP)]


class StopRequest:
    """One run's."""

    def __init__(self, observer: RunObserver) -> None:
        self.requested = asyncio.Event()
        self._observer = observer
        self._task: asyncio.Task[Any] | None = None
        self._can_wait: Callable[[], bool] = lambda: False
        self._watcher: asyncio.Task[None] | None = None
        self._ended_by = ""
        self._asked: dict[str, float] = {}  # when, by reason

    @contextlib.contextmanager
    def on_signals(self, *, can_wait: Callable[[], bool]) -> Iterator[None]:
        """Inside, signals ask the current task to stop. `can_wait()`: whether it checks `requested` by itself now."""
        loop = asyncio.get_running_loop()
        self._task, self._can_wait = asyncio.current_task(), can_wait
        before = {number: signal.getsignal(number) for number in handled(SIGNALS)}
        for number in before:
            loop.add_signal_handler(number, self.ask, number.name)
        try:
            yield
        finally:
            for number in before:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])

    def ask(self, why: str) -> None:
        """Stop: after the step that is trained, or at once where nothing is trained or it was asked before."""
        assert self._task is not None
        leave_dead_terminal()
        first = self._asked.setdefault(why, time.monotonic())
        if self.requested.is_set():
            # Schedulers send several kinds of signals, and some twice at once: only a later repetition counts.
            if why in SIGNAL_NAMES and time.monotonic() - first > REPEATED_S:
                self._ended_by = signal.SIGINT.name
                self._task.cancel()
            return
        self.requested.set()
        if self._can_wait():
            self._note(f"{why}: stopping after this step, with a checkpoint; once more to stop at once")
            return
        self._ended_by = why
        self._task.cancel()
        self._note(f"{why}: stopping; no step is being trained, so there is nothing to save")

    def watch(self, notices: Coroutine[Any, Any, None]) -> None:
        """Run something that will call `ask` beside the run; `leave` ends it."""
        self._watcher = asyncio.create_task(notices)
        self._watcher.add_done_callback(self._note_failure)

    def _note_failure(self, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled() and (error := watcher.exception()) is not None:
            self._note(f"preemption notices of nodes are no longer watched: {error!r}")

    def leave(self) -> None:
        """The run is over: end the watcher."""
        if self._watcher is not None:
            self._watcher.cancel()

    def explain(self) -> None:
        """For a cancelled run: raises `Preempted` where a scheduler asked for the stop; returns where a person did."""
        if self._ended_by and self._ended_by != signal.SIGINT.name:
            raise Preempted(
                f"stopped by {self._ended_by} while no step was trained; run the same command again to go on"
            ) from None

    def _note(self, text: str) -> None:
        self._observer.event("note", text=text)
