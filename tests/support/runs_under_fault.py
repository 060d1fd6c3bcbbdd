"""Start a run, wait for something in its own records, do harm, and compare what came out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
from leftovers import once_gone
from safetensors.torch import load_file
from tiny_runs import records

DIES_AFTER_STEP_5 = """
import os, signal
from launch.cli import main
from launch.report.observer import RunObserver

told = RunObserver.step

def told_and_killed(self, metrics):
    told(self, metrics)
    if metrics.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

RunObserver.step = told_and_killed
main()
"""
"""For `start(code=...)`: a run that is killed as soon as step 5 is told."""

_started: list[subprocess.Popen[str]] = []


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["train/loss"] for record in records(run, "step")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def events(run: Path, name: str) -> list[dict]:
    return [record for record in records(run, "event") if record["name"] == name]


def notes(run: Path) -> list[str]:
    return [event["text"] for event in events(run, "note")]


def assert_same_result(run: Path, golden: Path) -> None:
    assert losses(run) == losses(golden)
    assert counted(run) == counted(golden)
    ours, theirs = weights(run), weights(golden)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def newest(run: Path, role: str) -> int:
    """The pid of a role's newest process."""
    return [event["pid"] for event in events(run, "process") if event["role"] == role][-1]


def counted(run: Path) -> dict[str, int]:
    """What the manifest says was read and trained, events aside."""
    counters = json.loads((run / "manifest.json").read_text())["counters"]
    read = ("read", "good", "rejected", "dropped_too_long", "truncated", "label_bytes")
    return {name: count for name, count in counters.items() if name.startswith("trained_") or name in read}


def start(config: Path, *, code: str | None = None, said: Path | None = None) -> subprocess.Popen[str]:
    """`stillhouse train`; with `code`, which has to call `launch.cli.main`, in its place. What it says is appended to
    the file `said`, or waits in a pipe, which holds some hundred lines."""
    with said.open("a") if said is not None else nullcontext(subprocess.PIPE) as output:
        process = subprocess.Popen(
            [sys.executable, *(["-m", "launch"] if code is None else ["-c", code]), "train", str(config)],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=dict(os.environ),
        )
    _started.append(process)
    return process


def end_started() -> None:
    """End every run that a failed test has left; what it started notices by itself."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)


def when(run: Path, ready: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 900) -> None:
    """Wait until the run's own records say that something happened."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and ready():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"nothing happened within {timeout_s} s: {process.communicate()[0]}")


@contextmanager
def held(process: subprocess.Popen[str]) -> Iterator[None]:
    """Stop a run's controller meanwhile: the run gets no further, and a signal sent to it arrives afterwards."""
    stop(process)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def stop(process: subprocess.Popen[str]) -> None:
    """Stop a run's controller; returns when it stands."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def finish(process: subprocess.Popen[str], timeout_s: float = 600) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"not over after {timeout_s:.0f} s: {process.communicate()[0]}") from None
    return process.returncode, output


def left_running(run: Path, timeout_s: float = 20) -> list[str]:
    """Processes of the run's roles that still exist after at most `timeout_s`."""
    pids = [event["pid"] for event in events(run, "process")]
    return once_gone(lambda: [str(pid) for pid in pids if _lives(pid)], timeout_s)


def _lives(pid: int) -> bool:
    """Whether there is such a process that is more than an entry for its parent to read."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
