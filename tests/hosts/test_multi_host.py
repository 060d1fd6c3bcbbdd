"""A run on several hosts: submitted from a host that is no member of the cluster, hosts killed in its middle, drained.

    host1   Ray's head, the run's own process, a teacher      host3   a rank; its name leads to a dead interface
    host2   a teacher                                         host4   a rank; Debian's `127.0.1.1 NAME`
    host5   no member: it has the dashboard's address and the token

Every run is compared with one on a single host, and after every ending the hosts are searched for what is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, Hosts, wait_until, why_not
from leftovers import once_gone
from ray_hosts import RayOnHosts, settled
from runs_under_fault import events, losses
from tiny_runs import merged, records, tiny_run

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

STEPS = 16
TOLERANCE = 1e-4  # relative, of every loss: vLLM and transformers add the same float32 numbers in another order
RESTART_TOLERANCE = 1e-6  # the same engine; new processes have their tensors elsewhere, and so round sums elsewhere
TEACHERS, STUDENTS = ("host1", "host2"), ("host3", "host4")
LABELS = {**{name: {"pool": "teacher"} for name in TEACHERS}, **{name: {"pool": "student"} for name in STUDENTS}}
RUN = {
    "teacher": {"scorer": {"replicas": 2}},
    "labels": {"k": 200},  # large: they can be told from other traffic
    "training": {"steps": STEPS, "sequences_per_step": 64, "micro_batch_tokens": 1024, "save_every": 4},
    "faults": {"ping_interval_s": 2.0, "ping_timeout_s": 120.0},
    "report": {"generate": 0, "viewer_sequences": 0},
}
ON_FOUR_HOSTS = {
    "student": {"placement": {"strategy": "strict_spread", "node_labels": {"pool": "student"}}},
    "teacher": {"scorer": {"placement": {"strategy": "spread", "node_labels": {"pool": "teacher"}}}},
}
VLLM = {"teacher": {"scorer": {"engine": {"kind": "vllm", "kv_cache_bytes": 32 * 2**20}}}}
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts.create(5, folder=tmp_path_factory.mktemp("multi")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def alone(hosts: Hosts) -> Path:
    """The run folder of the same run on one host: the plain command, a Ray of its own."""
    config = tiny_run(hosts.shared / "alone", merged(RUN, {"name": "alone"}))
    result = hosts[4].run(["stillhouse", "train", config], OFFLINE, timeout_s=900)
    assert result.returncode == 0, result.stdout
    assert once_gone(hosts[4].processes, 60) == []
    return config.parent / "run"


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, alone: Path) -> RayOnHosts:
    """Ray on the first four hosts; two of them would mislead gloo."""
    third, fourth = hosts[2], hosts[3]
    third.add_dead_interface()
    third.resolve_own_name("dead_interface")
    fourth.resolve_own_name("loopback")
    cluster = RayOnHosts(hosts[:4], shared=hosts.shared, labels=LABELS)
    cluster.start()
    return cluster


class Job:
    """A run submitted from host5, its output followed there."""

    def __init__(self, cluster: RayOnHosts, hosts: Hosts, name: str, *changes: Mapping[str, Any]) -> None:
        settings = merged(RUN, merged(ON_FOUR_HOSTS, {"name": name}))
        for change in changes:
            settings = merged(settings, change)
        config = tiny_run(hosts.shared / name, settings)
        self.run = config.parent / "run"
        self._log = (config.parent / "followed.log").open("w+")
        command = submit_command(config, address=cluster.jobs_url, token_path=cluster.token)
        self._process = hosts[4].popen(command, OFFLINE, stdout=self._log, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return Path(self._log.name).read_text()

    def when(self, ready: Callable[[], bool], timeout_s: float = 900) -> None:
        """Wait until the run's own records say that something happened."""
        deadline = time.monotonic() + timeout_s
        while not ((self.run / "metrics.jsonl").exists() and ready()):
            assert self._process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def finish(self, timeout_s: float = 600) -> int:
        """The exit code of `stillhouse submit --follow`, which is the run's own."""
        try:
            return self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over after {timeout_s:.0f} s: {self.output}") from None
        finally:
            print(self.output)  # shown where something else about the run is wrong

    def end(self, hosts: Hosts) -> None:
        """Nothing of it may run on, whatever became of the test: the run's own process, and who follows it."""
        self._log.close()
        if self._process.poll() is not None:
            return
        own = [one for host in hosts for one in host.processes() if str(self.run.parent) in one.command]
        for one in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def seats(self, names: Mapping[str, str]) -> dict[str, list[str]]:
        """The hosts that each role has been on, one for each of its starts."""
        found: dict[str, list[str]] = {}
        for event in events(self.run, "process"):
            found.setdefault(event["role"], []).append(names[event["node"]])
        return found


Submit = Callable[..., Job]


@pytest.fixture
def submit(cluster: RayOnHosts, hosts: Hosts) -> Iterator[Submit]:
    """Submit a run: its name and changes. Afterwards it is over and every member is there, also where a test failed."""
    jobs: list[Job] = []

    def submit(name: str, *changes: Mapping[str, Any]) -> Job:
        jobs.append(Job(cluster, hosts, name, *changes))
        return jobs[-1]

    yield submit
    for job in jobs:
        job.end(hosts)
    off = [host for host in cluster.members if not host.is_on]
    for host in off:
        host.boot()
    cluster.join(off)


def submit_command(config: Path, **options: object) -> list[str]:
    given = [part for key, value in options.items() for part in ("--with", f"{key}={value}")]
    return ["stillhouse", "submit", str(config), "--to", "ray", *given, "--shared", str(config.parent), "--follow"]


def scorer_hosts(seats: Mapping[str, list[str]]) -> list[str]:
    return sorted(seats.get("scorer-0", []) + seats.get("scorer-1", []))


def worst_difference(run: Path, golden: Path) -> float:
    """Relative, over the losses of all steps."""
    ours, theirs = losses(run), losses(golden)
    assert ours.keys() == theirs.keys() == set(range(1, STEPS + 1))
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in ours)


def moved(host: Host, before: tuple[int, int]) -> tuple[int, int]:
    received, sent = host.received_and_sent()
    return received - before[0], sent - before[1]


def test_two_teachers_and_two_ranks_on_four_hosts_learn_what_one_host_learns(
    cluster: RayOnHosts, hosts: Hosts, alone: Path, submit: Submit
) -> None:
    before = {host.name: host.received_and_sent() for host in hosts}
    job = submit("four", VLLM)
    assert job.finish() == 0, job.output
    wire = {host.name: moved(host, before[host.name]) for host in hosts}
    seats = job.seats(cluster.names())
    assert sorted(seats) == ["scorer-0", "scorer-1", "student-0", "student-1"]
    assert scorer_hosts(seats) == list(TEACHERS)
    assert sorted(seats["student-0"] + seats["student-1"]) == list(STUDENTS)
    label_bytes = sum(record["labels/bytes"] for record in records(job.run, "step"))
    assert worst_difference(job.run, alone) <= TOLERANCE
    sent = sum(wire[name][1] for name in TEACHERS)
    received = sum(wire[name][0] for name in STUDENTS)
    assert label_bytes <= sent <= 1.6 * label_bytes, "once over the wire, and Ray's own traffic"
    assert label_bytes <= received
    assert wire["host1"][0] < 0.5 * label_bytes, "and not by way of the controller"
    assert settled(hosts) == []


@pytest.mark.long
def test_a_killed_teacher_host_and_a_killed_student_host_change_nothing(
    cluster: RayOnHosts, hosts: Hosts, alone: Path, submit: Submit
) -> None:
    """Long: two minutes, and what a run does when its nodes are gone is in e2e/test_host_loss.py too, on raylets."""
    names = cluster.names()
    job = submit("killed")
    job.when(lambda: 2 in losses(job.run))
    hosts[1].kill()
    job.when(lambda: 5 in losses(job.run))
    hosts[3].kill()  # the ranks need two hosts of their pool, so they wait; the teachers have a slot left on host1
    # Back before its death is noticed, it would be taken for its old self.
    wait_until(lambda: "host4" not in cluster.nodes(), 120, every_s=1)
    job.when(lambda: len(scorer_hosts(job.seats(names))) >= 3)
    hosts[3].boot()
    cluster.join([hosts[3]])
    assert job.finish() == 0, job.output
    assert worst_difference(job.run, alone) <= RESTART_TOLERANCE
    seats = job.seats(cluster.names())
    assert scorer_hosts(seats) == ["host1", "host1", "host2"], "the lost one moved"
    assert sorted(seats["student-0"] + seats["student-1"]) == ["host3", "host3", "host4", "host4"], "all ranks anew"
    assert len(events(job.run, "students_lost")) == 1
    assert settled(hosts) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_path": "{shared}/wrong_token"}, ["token"]),
        ({"token_path": "{shared}/no_token"}, ["no_token"]),
        ({"address": "http://10.77.0.99:8265"}, ["10.77.0.99:8265"]),
        ({"address": "http://10.77.0.11:9999"}, ["10.77.0.11:9999"]),
    ],
    ids=["wrong token", "no token file", "no such host", "wrong port"],
)
def test_a_mistake_is_named_on_the_host_that_submits(
    cluster: RayOnHosts, hosts: Hosts, changes: Mapping[str, str], said: list[str]
) -> None:
    wrong = hosts.shared / "wrong_token"
    wrong.touch(mode=0o600)
    wrong.write_text("0" * 64)
    config = tiny_run(hosts.shared / "mistake", merged(RUN, {"name": "mistake"}))
    options = {"address": cluster.jobs_url, "token_path": cluster.token}
    options |= {key: value.format(shared=hosts.shared) for key, value in changes.items()}
    result = hosts[4].run(submit_command(config, **options), OFFLINE, timeout_s=300)
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stdout
    for words in said:
        assert words in result.stdout
    assert not (config.parent / "run").exists()


@pytest.mark.long
def test_a_drain_notice_saves_a_checkpoint_and_exits_75(cluster: RayOnHosts, hosts: Hosts, submit: Submit) -> None:
    """Long: what a run does on such a notice is in e2e/test_host_loss.py too, on raylets."""
    job = submit("drained", {"training": {"steps": 50_000, "save_every": 0}})
    job.when(lambda: 2 in losses(job.run))
    node = cluster.nodes()["host3"]
    notice = [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "90",
    ]
    drain = ["ray", "drain-node", "--address", cluster.address, "--node-id", node, *notice]
    assert cluster.head.run(drain, cluster.env).returncode == 0
    assert job.finish(400) == 75, job.output
    saved = [event["at_step"] for event in events(job.run, "checkpoint")]
    assert saved == [max(losses(job.run))]
    assert "host3" in next(line for line in job.output.splitlines() if "taken away" in line)
    assert settled(hosts) == []
