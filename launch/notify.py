"""Telling people, or their programs, how a run ended: `notify:` of its configuration.

    how it ended + newest numbers  ->  Notice  --POST of JSON-->            webhook    both at once, each within
                                               --stdin and variables-->     command    notify.timeout_s

Told once for each ending. What cannot be told is a line on stderr: it changes neither the ending nor the exit code.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

from configs.notify import Ending, Notify
from configs.secrets import without_secrets
from launch.process import system_errors
from launch.report.metrics import LOSS, evaluation_values
from launch.report.numbers import compact, duration
from launch.report.observer import RunObserver
from launch.stall import Stalled
from launch.stopping import SIGNALS, handled
from trainer.errors import Preempted, StillhouseError
from trainer.run_folder import RunFolder, plain

INTERRUPTED = 130
LONGEST_REASON, LONGEST_TEXT = 4000, 600
GRACE_S = 2.0  # beyond notify.timeout_s, for threads to say what went wrong
HURRY_S = 0.5  # for a command to be ended
POLL_S = 0.05
VARIABLES = ("run", "kind", "exit_code", "host", "step", "steps", "loss", "reason", "folder", "report", "text")
"""Fields of a notice that a command finds in its environment, as STILLHOUSE_RUN and so on; "" where there is none."""

_VERBS: dict[Ending, str] = {
    "end": "is trained to the end",
    "failure": "failed",
    "stall": "got no further and was ended",
    "preemption": "was stopped before its end",
}


def kind_of(code: int, *, stalled: bool = False) -> Ending:
    """What an exit code means to whoever waits for the run."""
    if stalled:
        return "stall"
    if code == 0:
        return "end"
    return "preemption" if code in (Preempted.exit_code, INTERRUPTED) else "failure"


def warn(text: str) -> None:
    """To stderr, whatever became of it."""
    with contextlib.suppress(OSError):
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Notifier:
    """Of one run. `tell` gets a sentence for each that could not be told."""

    def __init__(
        self, name: str, notify: Notify | None, folder: RunFolder, *, tell: Callable[[str], None] = warn
    ) -> None:
        self._name = name
        self._notify = notify
        self._folder = folder
        self._tell = tell
        self._began = psutil.Process().create_time()  # as the hours of a run are counted
        self._observer: RunObserver | None = None
        self._steps: int | None = None
        self._told = threading.Lock()  # never given back

    def follow(self, observer: RunObserver, *, steps: int) -> None:
        """Where the run's numbers are from now on; `steps` it has in all."""
        self._observer, self._steps = observer, steps

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Inside, whatever ends the run early is told and raised again."""
        try:
            with system_errors():
                yield
        except StillhouseError as error:
            self.ended(error.exit_code, str(error), stalled=isinstance(error, Stalled))
            raise
        except KeyboardInterrupt:
            self.ended(INTERRUPTED, "interrupted")
            raise
        except BaseException as error:
            self.ended(1, f"{type(error).__name__}: {error}")
            raise

    def ended(self, code: int, reason: str, *, stalled: bool = False) -> None:
        """Tell it, within notify.timeout_s and from any thread. A later call does nothing."""
        kind = kind_of(code, stalled=stalled)
        if self._notify is None or not self._told.acquire(blocking=False):
            return
        wanted = set(self._notify.on)
        if kind not in wanted and not (kind == "stall" and "failure" in wanted):
            return
        with _signals_noted() as noted:
            for text in deliver(self._notify, self._notice(kind, code, reason), hurry=lambda: signal.SIGINT in noted):
                self._tell(without_secrets(text, environment=os.environ))

    def _notice(self, kind: Ending, code: int, reason: str) -> dict[str, Any]:
        observer, report = self._observer, self._folder.report
        step = None if observer is None else observer.newest_step
        evaluation = None if observer is None else observer.newest_evaluation
        notice = {
            "run": self._name,
            "host": socket.gethostname(),
            "kind": kind,
            "exit_code": code,
            "reason": without_secrets(reason, environment=os.environ)[:LONGEST_REASON],
            "step": None if step is None else step.step,
            "steps": self._steps,
            "loss": None if step is None else step.values.get(LOSS),
            "evaluation": None if evaluation is None else {"step": evaluation.step, **evaluation_values(evaluation)},
            "began": self._began,
            "ended": time.time(),
            "folder": str(self._folder.path.absolute()),
            "report": str(report.absolute()) if report.exists() else None,
        }
        return {"text": _text(notice), **plain(notice)}


def _text(notice: Mapping[str, Any]) -> str:
    """One line or two for a chat."""
    parts = [f"{notice['run']} {_VERBS[notice['kind']]} on {notice['host']}"]
    parts.append(f"after {duration(notice['ended'] - notice['began'])}, exit code {notice['exit_code']}")
    if notice["step"] is not None:
        parts.append(f"step {notice['step']} of {notice['steps']}")
    if notice["loss"] is not None:
        parts.append(f"loss {compact(notice['loss'])}")
    if notice["evaluation"]:
        shown = {"forward_kl": "held-out KL", "perplexity": "perplexity"}
        measured = (f"{shown[k]} {compact(v)}" for k, v in notice["evaluation"].items() if k in shown)
        parts += measured
    text = ", ".join(parts)
    if notice["kind"] != "end":
        reason = " ".join(notice["reason"].split())
        text += f": {reason if len(reason) <= LONGEST_TEXT else reason[:LONGEST_TEXT] + ' ...'}"
    return text + (f"\nreport: {notice['report']}" if notice["report"] else "")


# --- telling ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """The signals that come meanwhile, and change nothing: the run is over, whatever is asked of it now."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in handled(SIGNALS)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def deliver(notify: Notify, notice: Mapping[str, Any], *, hurry: Callable[[], bool]) -> list[str]:
    """Tell the webhook and the command at the same time, and wait for both, unless there is `hurry`; what went wrong, a
    sentence each."""
    ways: dict[str, Callable[[], None]] = {}
    if notify.webhook is not None:
        ways["webhook"] = lambda: post(notify, notice)
    if notify.command is not None:
        ways["command"] = lambda: call(notify, notice, hurry=hurry)
    wrong: dict[str, str] = {}
    threads = {name: _started(name, way, wrong) for name, way in ways.items()}
    deadline = time.monotonic() + notify.timeout_s + GRACE_S
    while any(thread.is_alive() for thread in threads.values()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
        if hurry():
            deadline = min(deadline, time.monotonic() + HURRY_S)
    for name, thread in threads.items():
        if thread.is_alive():
            wrong[name] = "not waited for" if hurry() else f"no answer within {notify.timeout_s:g} s"
    return [f"notify.{name}: how the run ended could not be told: {text}" for name, text in wrong.items()]


def _started(name: str, way: Callable[[], None], wrong: dict[str, str]) -> threading.Thread:
    def tell() -> None:
        try:
            way()
        except NotToldError as error:
            wrong[name] = str(error)
        except OSError as error:
            wrong[name] = error.strerror or type(error).__name__

    thread = threading.Thread(target=tell, daemon=True, name=f"notify-{name}")
    thread.start()
    return thread


class NotToldError(Exception):
    """Somebody could not be told: why, without the address."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere becomes a GET without its body, and would look well."""

    def redirect_request(self, *args: Any) -> None:
        return None


def post(notify: Notify, notice: Mapping[str, Any]) -> None:
    """POST a notice to the webhook; any answer of 2xx is good. Raises `NotToldError`."""
    try:
        address = notify.address(os.environ)
    except ValueError as error:
        raise NotToldError(str(error)) from None
    assert address is not None
    headers = {"Content-Type": "application/json", "User-Agent": "stillhouse"}
    try:
        request = urllib.request.Request(address, json.dumps(notice).encode(), headers, method="POST")
        urllib.request.build_opener(_NoRedirects).open(request, timeout=notify.timeout_s).close()
    except urllib.error.HTTPError as error:
        elsewhere = "; write the address that it leads to" if 300 <= error.code < 400 else ""
        raise NotToldError(f"the server answered {error.code} {error.reason}{elsewhere}") from None
    except urllib.error.URLError as error:
        raise NotToldError(_why(error.reason, notify)) from None
    except OSError as error:
        raise NotToldError(_why(error, notify)) from None
    except (ValueError, http.client.HTTPException) as error:  # their texts may hold the address
        raise NotToldError(f"no HTTP as it should be ({type(error).__name__})") from None


def _why(reason: object, notify: Notify) -> str:
    """There is no connection, or no answer."""
    if isinstance(reason, TimeoutError):
        return f"no answer within {notify.timeout_s:g} s"
    return getattr(reason, "strerror", None) or f"no connection ({type(reason).__name__})"


def call(notify: Notify, notice: Mapping[str, Any], *, hurry: Callable[[], bool]) -> None:
    """Run the command, in a session of its own that is ended at the deadline, or where there is `hurry`. Raises
    `NotToldError`, OSError."""
    command = notify.command
    assert command is not None
    arguments = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    values = {f"STILLHOUSE_{name.upper()}": notice[name] for name in VARIABLES}
    told = {name: "" if value is None else str(value).replace("\0", "") for name, value in values.items()}
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output:
        given.write(json.dumps(notice).encode() + b"\n")
        given.seek(0)
        process = subprocess.Popen(
            arguments,
            stdin=given,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | told,
            start_new_session=True,
        )
        deadline = time.monotonic() + notify.timeout_s
        while (code := process.poll()) is None and time.monotonic() < deadline and not hurry():
            time.sleep(POLL_S)
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code != 0:
            output.seek(0)
            raise NotToldError(_complaint(code, output.read(4000).decode(errors="replace"), notify))


def _complaint(code: int | None, output: str, notify: Notify) -> str:
    last = " ".join(output.split())[-200:]
    how = f"killed after at most {notify.timeout_s:g} s" if code is None else f"exit code {code}"
    return f"{how}{f': {last}' if last else ''}"
