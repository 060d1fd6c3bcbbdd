"""A long run that is hit twenty times: ranks, scorers and the controller are killed or hang at seeded moments.

Whatever happens, the result is that of a run nobody touched: every step once, the same losses, the same weights, and
no process left. With `engine: hf` to the last bit; vLLM sums in an order that depends on what is in flight beside.
A person would do here what `disturbed` does: start the same command again when the controller was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from leftovers import Leftovers, leftovers
from runs_under_fault import assert_same_result, counted, events, finish, losses, start, weights
from tiny_runs import records, tiny_run

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(4 * 3600)]

STEPS = 150
FAULTS = Counter(
    {
        ("student", "kill"): 4,
        ("student", "hang"): 3,
        ("scorer", "kill"): 4,
        ("scorer", "hang"): 3,
        ("controller", "kill"): 4,
        ("controller", "hang"): 2,
    }
)
HANG_S = 20.0  # of a controller: nobody replaces it, and it goes on
TOLERANCE = 1e-4  # relative, of every loss and of every weight's norm, for engines that are not exact
ENGINES: dict[str, dict[str, Any]] = {"hf": {"kind": "hf"}, "vllm": {"kind": "vllm", "kv_cache_bytes": 32 * 2**20}}


@dataclass(frozen=True)
class Fault:
    """Sent when a step is trained and a moment has passed."""

    step: int
    after_s: float
    role: str  # "student-1", "scorer-0", "controller"
    kind: str


def plan_of(faults: Counter[tuple[str, str]], *, steps: int, seed: int) -> list[Fault]:
    chance = random.Random(seed)
    kinds = list(faults.elements())
    chance.shuffle(kinds)
    at = sorted(chance.sample(range(3, steps - 25), len(kinds)))  # the last one while there is something left to train
    plan = []
    for step, (role, kind) in zip(at, kinds, strict=True):
        name = role if role == "controller" else f"{role}-{chance.randrange(2)}"
        plan.append(Fault(step, round(chance.uniform(0, 1.0), 2), name, kind))
    return plan


def soak_run(folder: Path, engine: str, *, steps: int) -> Path:
    return tiny_run(
        folder,
        {
            "teacher": {"scorer": {"engine": ENGINES[engine], "replicas": 2}},
            "training": {"steps": steps, "save_every": 5, "evaluate_every": 50},
            "faults": {
                "start_timeout_s": 240,
                "ping_interval_s": 2,
                "ping_timeout_s": 20,
                "score_timeout_s": 120,
                "step_timeout_s": 60,
            },
        },
    )


def pid_of(run: Path, role: str, process: subprocess.Popen[str]) -> int | None:
    """A process of a role that can still be hit. Of a scorer that is being replaced the other one, or the run would be
    over before it is back; None while the group of the students is, for a rank that hangs before its first step has the
    deadline of a start."""
    if role == "controller":
        return process.pid
    started = {event["role"]: event for event in events(run, "process")}
    roles = [role, f"scorer-{1 - int(role[-1])}"] if role.startswith("scorer") else [role]
    able = [started[one] for one in roles if one in started and runs(started[one]["pid"])]
    if not able or (role.startswith("student") and not trained_since(run, able[0]["time"])):
        return None
    return able[0]["pid"]


def runs(pid: int) -> bool:
    """Neither dead nor stopped."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def trained_since(run: Path, time_s: float) -> bool:
    return any(record["time"] > time_s for record in records(run, "step"))


def hit(run: Path, fault: Fault, process: subprocess.Popen[str], said: Path) -> int:
    """Send the fault when its moment has come: this process has trained the step, or a later one. Returns whom it hit;
    a rank that ended in that very moment, with its group, is waited for again."""
    began = psutil.Process(process.pid).create_time()
    while True:
        assert process.poll() is None, said.read_text()[-5000:]
        trained = [record["step"] for record in records(run, "step") if record["time"] > began]
        if max(trained, default=0) >= fault.step:
            pid = pid_of(run, fault.role, process)
            if pid is not None:
                time.sleep(fault.after_s)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
                    return pid
        time.sleep(0.1)


def disturbed(config: Path, plan: list[Fault], left: Leftovers) -> int:
    """The run, hit by every fault of the plan. Returns how often it was started."""
    run, said = config.parent / "run", config.parent / "said.txt"
    process, starts = start(config, said=said), 1
    for fault in plan:
        pid = hit(run, fault, process, said)
        print(f"{time.strftime('%H:%M:%S')} {fault}", flush=True)
        if fault.role != "controller":
            continue
        if fault.kind == "hang":
            time.sleep(HANG_S)
            os.kill(pid, signal.SIGCONT)
        else:
            process.wait(timeout=60)
            assert left.after() == []
            process, starts = start(config, said=said), starts + 1
    code, _ = finish(process, timeout_s=3600)
    assert code == 0, said.read_text()[-5000:]
    assert left.after() == []
    return starts


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_twenty_kills_and_hangs_change_nothing(tmp_path: Path, engine: str) -> None:
    soak(tmp_path, engine, steps=STEPS, faults=FAULTS, seed=8)


def soak(folder: Path, engine: str, *, steps: int, faults: Counter[tuple[str, str]], seed: int) -> None:
    golden = soak_run(folder / "golden", engine, steps=steps)
    config = soak_run(folder / "hit", engine, steps=steps)
    began = time.monotonic()
    code, _ = finish(start(golden, said=golden.parent / "said.txt"), timeout_s=3600)
    assert code == 0, (golden.parent / "said.txt").read_text()[-5000:]
    calm_s, began = time.monotonic() - began, time.monotonic()
    plan = plan_of(faults, steps=steps, seed=seed)
    with leftovers() as left:
        starts = disturbed(config, plan, left)
    summary = compared(config.parent / "run", golden.parent / "run")
    summary |= {
        "undisturbed_s": round(calm_s),
        "disturbed_s": round(time.monotonic() - began),
        "faults": [asdict(fault) for fault in plan],
        "starts": starts,
        "student_restarts": len(events(config.parent / "run", "students_restarted")),
        "teacher_restarts": len(events(config.parent / "run", "teacher_restart")),
    }
    (folder / "soak.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1), flush=True)
    assert [record["step"] for record in records(config.parent / "run", "step")] == list(range(1, steps + 1))
    assert counted(config.parent / "run") == counted(golden.parent / "run"), "nothing lost, nothing trained twice"
    if engine == "hf":
        assert_same_result(config.parent / "run", golden.parent / "run")
    else:
        assert summary["worst_loss"] <= TOLERANCE
        assert summary["worst_weight"] <= TOLERANCE


def compared(run: Path, golden: Path) -> dict[str, float]:
    """The largest relative differences to the undisturbed run: of a step's loss, and of a weight, by its norm."""
    ours, theirs = losses(run), losses(golden)
    ours_w, theirs_w = weights(run), weights(golden)
    assert ours_w.keys() == theirs_w.keys()
    return {
        "worst_loss": max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs),
        "worst_weight": max(float((ours_w[n] - theirs_w[n]).norm() / theirs_w[n].norm()) for n in theirs_w),
    }
