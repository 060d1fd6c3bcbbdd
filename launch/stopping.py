"""How a run is asked to stop, by signals and by notices, and what becomes of it.

while steps are trained    the step ends, a checkpoint is saved, exit 75
at any other time          nothing would be saved that is not, so it ends at once: exit 75, or 130 for Ctrl-C
the same signal again      at once, exit 130
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from launch.watch import Watch
from trainer.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SIGNAL_NAMES = tuple(number.name for number in SIGNALS)
REPEATED_S = 1.0


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Outside of the loops, a scheduler's signal ends the run in order: `Preempted` where the run is just then."""

    def stop(number: int, frame: object) -> None:
        raise Preempted(
            f"stopped by {signal.Signals(number).name} while no step was trained; run the same command again to go on"
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """One run's."""

    def __init__(self, watch: Watch) -> None:
        self.requested = asyncio.Event()
        self._watch = watch
        self._task: asyncio.Task[Any] | None = None
        self._can_wait: Callable[[], bool] = lambda: False
        self._watcher: asyncio.Task[None] | None = None
        self._ended_by = ""
        self._asked: dict[str, float] = {}  # when, by reason

    @contextlib.contextmanager
    def on_signals(self, *, can_wait: Callable[[], bool]) -> Iterator[None]:
        """Inside, signals ask the current task to stop. `can_wait()`: it looks at `requested` by itself now."""
        loop = asyncio.get_running_loop()
        self._task, self._can_wait = asyncio.current_task(), can_wait
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, self.ask, number.name)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])

    def ask(self, why: str) -> None:
        """Stop: after the step that is trained, or at once where nothing is trained or it was asked before."""
        assert self._task is not None
        first = self._asked.setdefault(why, time.monotonic())
        if self.requested.is_set():
            # Schedulers send several kinds of signals, and some twice at once: only a repeated one means it.
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

    def leave(self) -> None:
        """The run is over: what is asked now changes nothing."""
        if self._watcher is not None:
            self._watcher.cancel()

    def explain(self) -> None:
        """For a cancelled run: raises `Preempted` where a scheduler asked, and nothing where a person did."""
        if self._ended_by and self._ended_by != signal.SIGINT.name:
            raise Preempted(
                f"stopped by {self._ended_by} while no step was trained; run the same command again to go on"
            ) from None

    def _note(self, text: str) -> None:
        self._watch.event("note", text=text)
