"""The process of one tracker: reads metrics.jsonl as the run writes it, and hands its points to the tracker.

    stdin   an `Assignment`, then orders, one JSON a line:  {"after": step}  the run goes on after this step
                                                            {"end": {...}}   it is over (`Ending`); so is it at the end
                                                                             of stdin, where its process is gone
    stdout  sentences for the user, one JSON string a line
    stderr  what the library prints: logs/tracker-<name>.log

The main thread takes orders and looks at the clock; a second thread makes all calls of the tracker. What fails is told
once and tried again, later each time, until the run ends; what hangs is told once. Nothing is lost meanwhile, since the
points are in the file. Started by `launch/trackers/trackers.py`; imports no torch.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from configs.errors import reason_of
from configs.secrets import without_secrets
from configs.trackers import TRACKERS
from launch.trackers.points import NewPoints, Sent
from launch.trackers.protocol import Ending, Point, RunFacts, TrackedRun, TrackerKind

POLL_S = 1.0
MANY_POINTS = 200  # in one call of a tracker
HANGS_AFTER_S = 60.0
AGAIN_S = (2.0, 5.0, 15.0, 60.0)
"""Between a failure and the next attempt: the first, the second, ..., the last for good."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which tracker, and which run."""

    name: str  # of the tracker, for people and for its files
    parameters: Mapping[str, Any]
    run: RunFacts
    close_s: float  # from the end of the run to the end of this process


Tell = Callable[[str], None]


class Follower:
    """Makes the calls of one tracker, in the thread that runs `follow`."""

    def __init__(self, assignment: Assignment, tracker: TrackerKind, *, destination: Mapping[str, Any], tell: Tell):
        self._name = assignment.name
        self._facts = assignment.run
        self._tracker = tracker
        self._tell = tell
        self._orders: queue.Queue[int | Ending | None] = queue.Queue()
        self._points = NewPoints(assignment.run.folder / "metrics.jsonl")
        self._record = assignment.run.folder / "trackers" / f"{assignment.name}.json"
        self._destination = destination
        self._sent = Sent()
        self._waiting: deque[Point] = deque()
        self._rewinds: deque[int] = deque()
        self._reads = False  # from the first order on: before it the file is that of an earlier attempt
        self._tracked: TrackedRun | None = None
        self._failures = 0
        self.calls_since: float | None = None
        """Since when the tracker has been busy with a call."""
        self.complete = True
        """Whether everything was sent, once the run is over."""

    def order(self, what: int | Ending | None) -> None:
        """The run goes on after a step, or it has ended (None: nobody knows how). From any thread."""
        self._orders.put(what)

    def follow(self) -> None:
        """Until the run has ended. The follower of a process that was killed may still be at work: it is waited for."""
        with FileLock(self._record.with_suffix(".lock")):
            self._sent = Sent.read(self._record, id=self._facts.id, destination=self._destination)
            self._follow()

    def _follow(self) -> None:
        while True:
            over, ending = self._take_orders()
            self.calls_since = time.monotonic()
            try:
                self._go_on()
                if over:
                    self._close(ending)
            except Exception as error:  # noqa: BLE001 -- of a library: whatever it raises, the run goes on
                self._failed(error, over=over)
            else:
                self._recovered()
            self.calls_since = None
            if over:
                return

    @property
    def state(self) -> str:
        """What is at the tracker."""
        return f"what came after step {self._sent.step}" if self._sent.step >= 0 else "this run"

    def _take_orders(self) -> tuple[bool, Ending | None]:
        """Waits until there is one, or something may be new; whether the run is over, and how it ended."""
        until = time.monotonic() + (AGAIN_S[min(self._failures, len(AGAIN_S)) - 1] if self._failures else POLL_S)
        while True:
            try:
                order = self._orders.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return False, None
            if not isinstance(order, int):
                return True, order
            self._rewinds.append(order)
            self._reads = True

    def _go_on(self) -> None:
        """Everything that is due; nothing before the run has numbers, so that one that cannot start leaves no trace."""
        if not self._reads:
            return
        if self._tracked is None:
            self._tracked = self._tracker.begin(self._facts)
            if (held := self._tracked.held) is not None:
                self._sent.cut(held)
            self._tell(f"{self._name}: {self._tracked.where}")
        while self._rewinds:
            if self._tracked.rewind(self._rewinds[0]):
                self._sent.cut(self._rewinds[0])
            self._rewinds.popleft()
            self._points.from_the_start()
            self._waiting.clear()
        while self._refill():
            some = [self._waiting[i] for i in range(min(MANY_POINTS, len(self._waiting)))]
            self._tracked.log(some)
            for point in some:
                self._sent.add(point)
                self._waiting.popleft()
            self._sent.write(self._record)

    def _refill(self) -> bool:
        """Whether points are to be sent."""
        if not self._waiting:
            self._waiting.extend(point for point in self._points.read() if not self._sent.has(point))
        return bool(self._waiting)

    def _close(self, ending: Ending | None) -> None:
        if self._tracked is not None:
            self._tracked.close(ending)

    def _failed(self, error: Exception, *, over: bool) -> None:
        self._failures += 1
        said = without_secrets(f"{self._name}: {reason_of(error)}", environment=os.environ)
        if over:
            self.complete = False
            self._tell(f"{said}; {self.state} is not there, and is in metrics.jsonl")
        elif self._failures == 1:
            self._tell(f"{said}; the run goes on, and what is missing there is sent when that succeeds")
        print(said, file=sys.stderr, flush=True)

    def _recovered(self) -> None:
        if self._failures:
            self._tell(f"{self._name}: it answers again, and has everything until step {max(self._sent.step, 0)}")
        self._failures = 0


def serve(orders: IO[str], tell: Tell) -> int:
    """Follow the run that the first line names, until its end. 0 where everything was sent in time."""
    told = json.loads(orders.readline())
    facts = RunFacts(**{**told["run"], "folder": Path(told["run"]["folder"])})
    assignment = Assignment(told["name"], told["parameters"], facts, told["close_s"])
    choice = TRACKERS.validate(assignment.parameters)
    follower = Follower(assignment, TRACKERS.load(choice), destination=choice.destination(), tell=tell)

    def follow() -> None:
        try:
            follower.follow()
        except Exception as error:
            follower.complete = False
            tell(f"{assignment.name}: {reason_of(error)}; the run goes on without it")
            raise

    worker = threading.Thread(target=follow, daemon=True)
    worker.start()
    _pass_on(orders, follower, name=assignment.name, tell=tell)
    worker.join(assignment.close_s)
    if worker.is_alive():
        tell(
            f"{assignment.name}: no answer within {assignment.close_s:.0f} s of the end of the run; {follower.state} "
            "may not be there, and is in metrics.jsonl"
        )
    return int(worker.is_alive() or not follower.complete)


def _pass_on(orders: IO[str], follower: Follower, *, name: str, tell: Tell) -> None:
    """All orders, until the run is over."""
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(orders, lines), daemon=True).start()
    parent, told = os.getppid(), False
    while True:
        try:
            line = lines.get(timeout=POLL_S)
        except queue.Empty:
            line = "" if os.getppid() != parent else None  # a child of the run may hold the other end of the pipe
        since = follower.calls_since
        if not told and since is not None and time.monotonic() - since > HANGS_AFTER_S:
            told = True
            tell(
                f"{name}: no answer for {HANGS_AFTER_S:.0f} s; the run goes on, and what is missing there is sent later"
            )
        if line is None:
            continue
        order = json.loads(line) if line else {"end": None}
        if "after" in order:
            follower.order(order["after"])
            continue
        follower.order(Ending(**order["end"]) if order["end"] else None)
        return


def _read(orders: IO[str], lines: queue.Queue[str]) -> None:
    for line in orders:
        lines.put(line)
    lines.put("")


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # they are for the run, which ends this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print

    def tell(text: str) -> None:
        try:
            print(json.dumps(text), file=answers, flush=True)
        except OSError:
            print(text, file=sys.stderr, flush=True)  # the run is gone

    code = serve(sys.stdin, tell)
    sys.stderr.flush()
    os._exit(code)  # a thread may wait inside the library, or hang


if __name__ == "__main__":
    main()
