"""Real submissions: to a Ray head whose environment lacks Stillhouse, from a process that is no member, and to this
machine. A run ends well, fails with its own code, is stopped, is submitted again, and is fetched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hosts import wait_until
from ray_head import RayHead, ray_head
from runs_under_fault import events, left_running
from tiny_runs import records, stillhouse, tiny_run, write_rows

from launch.jobs import ending_file
from trainer.run_folder import read_json

pytestmark = [pytest.mark.stack, pytest.mark.timeout(2400)]

SECRET = "hf_" + "plantedsecret" * 3
VLLM = {"engine": {"kind": "vllm", "kv_cache_bytes": 32 * 2**20}, "tensor_parallel_size": 2}
"""Two worker processes: the code has to be found in those, too."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head")) as running:
        yield running


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the person who submits; run folders lie elsewhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return tmp_path / "here"


def to(head: RayHead, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with the cluster's token in its environment, and the address of a cluster that is not meant."""
    return stillhouse(*arguments, timeout_s=600, RAY_ADDRESS="127.0.0.1:1", **head.environment)


def submit(head: RayHead, config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return to(head, "submit", str(config), "--to", "ray", "--with", f"address={head.address}", *arguments)


def holders_of_the_secret(*places: Path) -> list[str]:
    """Files with the planted token in them, in plain or inside an archive's name."""
    return subprocess.run(["grep", "-rlaF", SECRET, *places], capture_output=True, text=True).stdout.splitlines()


def forget_that_the_folder_is_visible(name: str) -> None:
    """As on another machine: nothing in the run folder counts as written by the job."""
    file = Path("runs") / name / "submission.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "submitted": time.time() + 3600}))
    ending_file(Path(record["folder"]), record["job"]).unlink()


def driver_of(run: Path, output: Callable[[], str]) -> psutil.Process:
    """The run's own process, once it trains."""
    try:
        wait_until(lambda: records(run, "step"), 900)
    except TimeoutError:
        raise AssertionError(output()) from None
    return psutil.Process(read_json(run / ".lock-owner.json")["pid"])


def asked_to_end(pid: int) -> bool:
    """Whether a SIGTERM waits for a process that is suspended."""
    fields = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return bool((int(fields["ShdPnd"], 16) | int(fields["SigPnd"], 16)) >> (signal.SIGTERM - 1) & 1)


def test_a_cluster_without_stillhouse_runs_what_was_submitted_and_gives_it_back(
    head: RayHead, here: Path, tmp_path: Path
) -> None:
    changes = {"teacher": {"scorer": VLLM}, "name": "sent", "training": {"steps": 4, "save_every": 2}}
    config, run = tiny_run(tmp_path / "tiny", changes), tmp_path / "tiny" / "run"
    result = submit(head, config, "--follow")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [record["step"] for record in records(run, "step")] == [1, 2, 3, 4]
    assert (run / "student" / "model.safetensors").exists()
    assert "succeeded, exit code 0" in to(head, "status", "sent").stdout
    assert "sent" in to(head, "list", "--to", "ray", "--with", f"address={head.address}").stdout
    assert "step 4/4" in to(head, "logs", "sent").stdout
    assert left_running(run) == []

    again = submit(head, config, "--follow")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "is finished: 4 steps" in again.stdout

    forget_that_the_folder_is_visible("sent")
    fetched = to(head, "fetch", "sent", "--into", "got")
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    for name in ("report.html", "metrics.jsonl", "exit.json", "manifest.json", "student/model.safetensors"):
        assert (here / "got" / name).read_bytes() == (run / name).read_bytes(), name
    assert not list(head.temp_dir.glob("session_*/logs/stillhouse-fetch-*"))

    assert holders_of_the_secret(tmp_path, head.temp_dir) == []
    shown = str(head.client().list_jobs()) + result.stdout + to(head, "logs", "sent").stdout
    assert SECRET not in shown
    assert head.token_path.read_text() not in shown
    assert {job.status for job in head.client().list_jobs()} == {"SUCCEEDED"}


def test_a_run_that_fails_on_the_cluster_returns_its_own_code(head: RayHead, here: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "tiny", {"name": "bad"})
    write_rows(tmp_path / "tiny" / "train.jsonl", [{"prompt": 7, "completion": None}])
    looked = submit(head, config)
    assert (looked.returncode, "nothing was sent" in looked.stdout) == (3, True)
    result = submit(head, config, "--no-check", "--follow")
    assert result.returncode == 3, result.stdout + result.stderr
    assert "failed, exit code 3" in result.stdout
    status = to(head, "status", "bad")
    assert status.returncode == 3
    assert "rows cannot be used" in status.stdout


def test_a_stopped_run_has_saved_and_goes_on_when_it_is_submitted_again(
    head: RayHead, here: Path, tmp_path: Path
) -> None:
    changes = {"name": "halted", "training": {"steps": 60, "save_every": 0, "sequences_per_step": 16}}
    config, run = tiny_run(tmp_path / "tiny", changes), tmp_path / "tiny" / "run"
    assert submit(head, config).returncode == 0
    driver = driver_of(run, lambda: to(head, "logs", "halted").stdout)
    driver.suspend()  # in its first steps; nothing below depends on how long it takes
    second = submit(head, config)
    assert second.returncode == 2
    assert "of the same run folder" in second.stderr
    watching = subprocess.Popen(
        [sys.executable, "-m", "launch", "logs", "-f", "halted"],
        env={**os.environ, **head.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "Runtime env is setting up" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    assert "halted-" in watching.communicate(timeout=300)[1]
    assert watching.returncode == 130
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(to, head, "stop", "halted")
        try:
            wait_until(lambda: asked_to_end(driver.pid) or stopping.done(), 300)
        finally:
            driver.resume()
    stopped = stopping.result()
    assert "stopped, exit code 75" in stopped.stdout, stopped.stdout + stopped.stderr
    assert to(head, "status", "halted").returncode == 75
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    done = len(records(run, "step"))
    assert 0 < done < 60
    assert left_running(run) == []

    result = submit(head, config, "--follow")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((run / "manifest.json").read_text())["resumed_from"] == done
    assert [record["step"] for record in records(run, "step")] == list(range(1, 61))


def test_a_run_on_this_machine_is_its_own_process_and_its_code_a_copy(here: Path, tmp_path: Path) -> None:
    config, run = tiny_run(tmp_path / "tiny", {"name": "near"}), tmp_path / "tiny" / "run"
    result = stillhouse("submit", str(config), "--to", "local", "--follow", timeout_s=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(records(run, "step")) == 8
    assert events(run, "process")
    assert left_running(run) == []
    assert stillhouse("fetch", "near").returncode == 0
    assert (here / "runs/near/report.html").read_bytes() == (run / "report.html").read_bytes()
    assert holders_of_the_secret(tmp_path) == []
