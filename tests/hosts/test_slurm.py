"""The batch script of `stillhouse submit --to slurm` in a real Slurm on three hosts: slurmctld on one, slurmd on two.

Ended three ways: by success, by scancel, and by its time limit with a checkpoint saved before. Each time the exit code
is the one that Slurm's users see, and nothing is left on any node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts, why_not
from runs_under_fault import events, losses
from slurm import SlurmOnHosts, why_no_slurm
from tiny_runs import merged, tiny_run

from launch.targets import JobRecord
from trainer.run_folder import read_json

WHY_NOT = why_not() or why_no_slurm()
pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

TARGET = {
    "nodes": 2,
    "cpus_per_node": 2,
    "memory": "3000M",
    "object_store_bytes": 100 * 2**20,
    "time": "0:20:00",
    "grace_s": 300,
}
RUN = {
    "student": {"placement": {"strategy": "strict_spread"}},
    "training": {"steps": 6, "save_every": 0},
    "report": {"generate": 0, "viewer_sequences": 0},
}
LONG = {"training": {"steps": 50_000}}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts.create(3, folder=tmp_path_factory.mktemp("slurm")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def slurm(hosts: Hosts) -> SlurmOnHosts:
    slurm = SlurmOnHosts(hosts[0], hosts[1:], folder=hosts.shared / "slurm", kill_wait_s=15)
    slurm.start()
    return slurm


class Job:
    """A run submitted from host1, as from a login node."""

    def __init__(self, slurm: SlurmOnHosts, folder: Path, *changes: Mapping[str, Any]) -> None:
        settings: Mapping[str, Any] = {**RUN, "name": folder.name}
        for change in changes:
            settings = merged(settings, change)
        self._slurm = slurm
        self._config = tiny_run(folder, settings)
        self._folder = folder
        self.run = folder / "run"
        self.submit()

    def submit(self) -> None:
        given = [part for key, value in TARGET.items() for part in ("--with", f"{key}={value}")]
        command = ["stillhouse", "submit", str(self._config), "--to", "slurm", *given, "--shared", str(self._folder)]
        self._slurm.command(*command, cwd=self._folder, timeout_s=300)
        record = JobRecord(**read_json(self._folder / "runs" / self._folder.name / "submission.json"))
        self.id = record.handle
        self._log = Path(record.folder) / "submissions" / record.job / "job.log"

    @property
    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else "(no output yet)"

    def when(self, ready: Callable[[], bool], timeout_s: float = 900) -> None:
        deadline = time.monotonic() + timeout_s
        while not ((self.run / "metrics.jsonl").exists() and ready()):
            assert not self._slurm.job(self.id).over, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.5)

    def status(self) -> tuple[int, str]:
        """Exit code and words of `stillhouse status`."""
        result = self._slurm.controller.run(
            ["stillhouse", "status", self._folder.name], self._slurm.env, cwd=self._folder
        )
        return result.returncode, result.stdout


def test_a_job_that_succeeds_is_completed_and_leaves_nothing(slurm: SlurmOnHosts, hosts: Hosts) -> None:
    job = Job(slurm, hosts.shared / "success")
    over = slurm.wait(job.id, 700)
    assert (over.state, over.exit_code) == ("COMPLETED", "0:0"), job.output
    assert over.nodes == "host[2-3]"
    assert len(losses(job.run)) == 6
    nodes = {event["role"]: event["node"] for event in events(job.run, "process")}
    assert nodes["student-0"] != nodes["student-1"]
    assert slurm.left_running() == []
    assert job.status()[0] == 0


@pytest.fixture(scope="module")
def limited(slurm: SlurmOnHosts, hosts: Hosts) -> Job:
    """A long run whose time limit comes near once it trains: an administrator lowers it to less than `grace_s` from
    now, so that nobody has to wait, and more than a slow machine needs to save and end."""
    job = Job(slurm, hosts.shared / "limited", LONG)
    job.when(lambda: 2 in losses(job.run))
    minutes = (slurm.seconds_running(job.id) + 60) // 60 + 4  # four to five minutes from now
    slurm.command("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")
    return job


def test_the_time_limit_saves_a_checkpoint_first(slurm: SlurmOnHosts, limited: Job) -> None:
    over = slurm.wait(limited.id, 400)
    assert (over.state, over.exit_code) == ("FAILED", "75:0"), limited.output
    assert "USR1" in limited.output
    saved = [event["at_step"] for event in events(limited.run, "checkpoint")]
    assert saved == [max(losses(limited.run))]
    assert slurm.left_running() == []
    code, said = limited.status()
    assert code == 75
    assert said.startswith("preempted")


def test_the_same_command_goes_on_and_scancel_leaves_nothing(slurm: SlurmOnHosts, limited: Job) -> None:
    saved = max(losses(limited.run))
    limited.submit()
    limited.when(lambda: saved + 2 in losses(limited.run))
    assert [event["from_step"] for event in events(limited.run, "resumed")] == [saved]
    slurm.command("scancel", limited.id)
    over = slurm.wait(limited.id, 300)
    assert over.state == "CANCELLED", limited.output
    assert slurm.left_running() == []
