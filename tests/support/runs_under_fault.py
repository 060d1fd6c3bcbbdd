"""Start a run, wait for something in its own records, do harm, and compare what came out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from tiny_runs import records


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["train/loss"] for record in records(run, "step")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def events(run: Path, name: str) -> list[dict]:
    return [record for record in records(run, "event") if record["name"] == name]


def assert_same_result(run: Path, golden: Path) -> None:
    assert losses(run) == losses(golden)
    assert counted(run) == counted(golden)
    ours, theirs = weights(run), weights(golden)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def counted(run: Path) -> dict[str, int]:
    """What the manifest says was read and trained, events aside."""
    counters = json.loads((run / "manifest.json").read_text())["counters"]
    read = ("read", "good", "rejected", "dropped_too_long", "truncated", "label_bytes")
    return {name: count for name, count in counters.items() if name.startswith("trained_") or name in read}


def start(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "train", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=dict(os.environ),
    )


def when(run: Path, ready: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 300) -> None:
    """Wait until the run's own records say that something happened."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and ready():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"nothing happened within {timeout_s} s: {process.communicate()[0]}")


def finish(process: subprocess.Popen[str], timeout_s: float = 240) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def left_running(run: Path) -> list[str]:
    """Processes of the run's roles that still exist."""
    pids = [event["pid"] for event in events(run, "process")]
    return [str(pid) for pid in pids if psutil.pid_exists(pid)]
