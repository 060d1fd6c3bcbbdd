"""Runs on a cluster of several nodes whose nodes die, are drained, or hold two runs at once.

Every node is a raylet of its own on this machine, killed without a word; separate hosts are tested in `tests/hosts`.
The labels of the tiny teacher come from `engine: {kind: hf}`, so what comes out must equal an undisturbed run.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from raylets import Raylets, raylets
from runs_under_fault import assert_same_result, events, finish, left_running, losses, notes, start, stop, when
from tiny_runs import merged, tiny_run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(2400)]

ON_NODES = {
    "student": {"placement": {"strategy": "strict_spread", "node_labels": {"pool": "students"}}},
    "teacher": {"scorer": {"placement": {"node_labels": {"pool": "teachers"}}}},
    "faults": {"ping_interval_s": 2, "room_timeout_s": 60},
}
NODES = {
    f"{pool}-{letter}": {"pool": pool}
    for pool, letters in (("teachers", "ab"), ("students", "abcd"))
    for letter in letters
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with raylets(NODES) as made:
        yield made


@pytest.fixture(scope="module")
def twins(cluster: Raylets, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Two runs of one name on the cluster at once, undisturbed, and the names of their actors."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    configs = [on_nodes(folder) for folder in folders]
    processes = [start(config) for config in configs]
    runs = [folder / "run" for folder in folders]
    with ThreadPoolExecutor() as pool:
        list(pool.map(stop_in_training, runs, processes))
    names = cluster.actor_names()
    for process in processes:
        process.send_signal(signal.SIGCONT)
    for process in processes:
        code, output = finish(process)
        assert code == 0, output
    return runs[0], runs[1], names


@pytest.fixture
def golden(twins: tuple[Path, Path, list[str]]) -> Path:
    """An undisturbed run."""
    return twins[0]


def on_nodes(folder: Path, *, steps: int = 40) -> Path:
    """The tiny run with a node for each process, every node reading its own copies of the models."""
    changes = merged(ON_NODES, {"training": {"steps": steps, "save_every": 4 if steps == 40 else 0}})
    copied = {"model": {"local_copy": str(folder / "disk")}}
    return tiny_run(folder, merged(changes, {"student": copied, "teacher": copied}))


def stop_in_training(run: Path, process: subprocess.Popen[str]) -> None:
    """The run that trains first waits for the other one, so that both are there at once."""
    when(run, lambda: num_starts(run, "student-1") == 1 and 1 in losses(run), process)
    stop(process)


def num_starts(run: Path, role: str) -> int:
    return sum(event["role"] == role for event in events(run, "process"))


def node_of(run: Path, role: str) -> str:
    """Where the newest process of a role is."""
    return [event["node"] for event in events(run, "process") if event["role"] == role][-1]


def test_two_runs_of_one_name_share_a_cluster_and_do_not_meet(twins: tuple[Path, Path, list[str]]) -> None:
    first, second, names = twins
    assert_same_result(first, second)
    for run in (first, second):
        copies = [path.name for path in (run.parent / "disk").iterdir() if path.is_dir()]
        assert sorted(name.partition("-")[0] for name in copies) == ["student", "teacher"]
    runs = Counter(re.fullmatch(r"(tiny-[0-9a-f]{6})/(?:scorer|student)-\d", name)[1] for name in names)
    assert len(runs) == 2, "each run has a name of its own"
    assert set(runs.values()) == {3}, names
    nodes = [{event["node"] for event in events(run, "process")} for run in (first, second)]
    assert not nodes[0] & nodes[1]


def test_a_run_survives_the_loss_of_its_teachers_and_of_a_students_node(
    golden: Path, cluster: Raylets, tmp_path: Path
) -> None:
    config = on_nodes(tmp_path)
    run = tmp_path / "run"
    process = start(config)
    when(run, lambda: 2 in losses(run), process)
    before = {role: cluster.name_of(node_of(run, role)) for role in ("scorer-0", "student-0", "student-1")}
    assert before["scorer-0"].startswith("teachers")
    assert {before["student-0"], before["student-1"]} < {name for name in NODES if name.startswith("students")}, (
        "strict_spread"
    )
    cluster.kill(before["scorer-0"])  # the only one: no step can be trained until it is back
    when(run, lambda: num_starts(run, "scorer-0") == 2, process)
    cluster.kill(before["student-1"])
    code, output = finish(process)
    assert code == 0, output
    after = {role: cluster.name_of(node_of(run, role)) for role in before}
    assert not set(after.values()) & {before["scorer-0"], before["student-1"]}
    assert after["scorer-0"].startswith("teachers")
    assert len({after["student-0"], after["student-1"]}) == 2
    assert len(events(run, "teacher_restart")) >= 1
    assert len(events(run, "students_lost")) >= 1
    assert_same_result(run, golden)
    assert left_running(run) == []


def test_a_notice_for_a_teachers_node_is_noted_and_one_for_a_students_node_saves_and_ends_with_75(
    cluster: Raylets, tmp_path: Path
) -> None:
    config = on_nodes(tmp_path, steps=5000)
    run = tmp_path / "run"
    process = start(config)
    when(run, lambda: 2 in losses(run), process)
    cluster.drain(cluster.name_of(node_of(run, "scorer-0")), seconds=120)
    when(run, lambda: any("scorer-0: the teacher starts again elsewhere" in note for note in notes(run)), process)
    step = max(losses(run))
    cluster.drain(cluster.name_of(node_of(run, "student-1")), seconds=60)
    code, output = finish(process)
    assert code == 75, output
    assert any("student-1: stopping after this step, with a checkpoint" in note for note in notes(run)), notes(run)
    assert events(run, "checkpoint")[-1]["at_step"] == max(losses(run)) >= step
    assert left_running(run) == []
