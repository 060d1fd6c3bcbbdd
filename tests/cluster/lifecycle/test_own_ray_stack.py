"""What a Ray that a run starts for itself consists of."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from cluster.lifecycle import ray_session
from cluster.lifecycle.processes import ProcessIdentity, kill_actor, wait_killed

pytestmark = pytest.mark.stack

UNUSED = ("autoscaler/", "dashboard/dashboard.py", "log_monitor.py", "ray::IDLE", "default_worker.py")


def _command_lines() -> list[str]:
    lines = []
    for process in psutil.Process().children(recursive=True):
        try:
            lines.append(" ".join(process.cmdline()[:4]))  # a raylet's goes on with the commands that it may start
        except psutil.NoSuchProcess:
            continue
    return lines


def test_it_starts_no_process_that_a_run_has_no_use_for_and_kills_actors_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = ray_session.start_ray(num_cpus=4, object_store_bytes=2**27)
    try:
        actor = ray.remote(_Actor).options(runtime_env={"env_vars": {"OF_A_ROLE": "1"}}).remote()
        node, pid, created, value = ray.get(actor.identify.remote())
        assert value == "1"
        time.sleep(3)  # what Ray starts unasked comes a moment after the first driver
        lines = _command_lines()
        assert any("raylet" in line for line in lines), "the control: Ray's processes are seen"
        assert [line for line in lines if any(name in line for name in UNUSED)] == []
        killing = kill_actor(actor, ProcessIdentity(node, pid, created))
        wait_killed(killing)
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert [line for line in _command_lines() if any(name in line for name in UNUSED)] == []
    finally:
        ray_session.stop_ray(cluster)


class _Actor:
    def identify(self) -> tuple[str, int, float, str]:
        import ray

        pid = os.getpid()
        created = psutil.Process(pid).create_time()
        return ray.get_runtime_context().get_node_id(), pid, created, os.environ["OF_A_ROLE"]
