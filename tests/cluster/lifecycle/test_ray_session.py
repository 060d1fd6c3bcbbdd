"""What Ray is told, and what its start refuses or names."""

from __future__ import annotations

import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import runtime
from cluster.lifecycle import ray_session
from launch.stopping import preemptible
from trainer.errors import ConfigError, InfrastructureError, Preempted


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """Starting Ray sets variables of this process, which Ray keeps in mind."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    ray_session.reread_ray_environment()


def test_ray_is_started_with_a_token_nobody_else_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_memory_monitor_refresh_ms"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = ray_session.ray_environment(memory_bytes=2**34)
    path = Path(table["RAY_AUTH_TOKEN_PATH"])
    assert table["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert len(path.read_text()) == 64
    assert ray_session.ray_environment(memory_bytes=2**34) == table, "the token is made once"
    assert table["RAY_memory_monitor_refresh_ms"] == "0"
    assert "RAY_memory_monitor_refresh_ms" not in ray_session.ray_environment(memory_bytes=2**40)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_token_that_others_may_read_is_refused_with_the_command_that_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    token = tmp_path / "token"
    token.write_text("ab12" * 16)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    token.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600 {token}"):
        ray_session.ray_environment(memory_bytes=2**40)
    with pytest.raises(ConfigError, match=f"chmod 600 {token}"):
        ray_session.start_ray(num_cpus=1, address="127.0.0.1:1")
    token.chmod(0o600)
    assert "RAY_AUTH_TOKEN_PATH" not in ray_session.ray_environment(memory_bytes=2**40)
    token.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        ray_session.ray_environment(memory_bytes=2**40)


def test_the_users_own_ray_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    table = ray_session.ray_environment(memory_bytes=2**40)
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & set(table)


def test_a_cluster_that_does_not_answer_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where a token of the user's may lie
    port = runtime.free_port()
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        ray_session.start_ray(num_cpus=1, address=f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        ray_session.start_ray(num_cpus=1)


@pytest.mark.parametrize("below", ["", "x" * 40])
def test_rays_folder_is_short_enough_for_its_sockets_and_lies_behind_a_closed_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_folder: str, below: str
) -> None:
    place = Path(short_folder, below)
    place.mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    session = ray_session.session_folder()
    try:
        assert session.stat().st_mode & 0o777 == 0o700
        assert ray_session.ray_folder(session).parent == session
        assert len(str(ray_session.ray_folder(session))) <= ray_session.MAX_TEMP_DIR
        assert (session.parent == place) == (below == "")
    finally:
        session.rmdir()


def test_metrics_ports_are_closed_unless_the_user_opens_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    closed = ray_session.METRICS_CLOSED
    assert closed.items() <= ray_session.ray_environment(memory_bytes=2**40).items()
    for name in closed:
        monkeypatch.setenv(name, "44300")
    assert not closed.keys() & ray_session.ray_environment(memory_bytes=2**40).keys()


@pytest.fixture
def short_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """For temporary files: short enough for sockets, unlike tmp_path."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


def test_a_ray_that_does_not_start_is_tried_twice_and_named_and_its_folders_go(
    monkeypatch: pytest.MonkeyPatch, short_folder: str
) -> None:
    import ray

    folders = []

    def init(**options: object) -> None:
        folders.append(Path(str(options["_temp_dir"])))
        assert folders[-1].parent.is_dir()
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InfrastructureError, match=r"load [\d.]+ on \d+ cores.*timed out during startup"):
        ray_session.start_ray(num_cpus=1)
    assert len(set(folders)) == 2
    assert os.listdir(short_folder) == []


def test_a_ray_that_starts_at_the_second_attempt_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, short_folder: str
) -> None:
    import ray

    attempts = []

    def init(**options: object) -> SimpleNamespace:
        attempts.append(options)
        if len(attempts) == 1:
            raise Exception("The current node timed out during startup.")
        return SimpleNamespace(address_info={"gcs_address": "127.0.0.1:6379"})

    monkeypatch.setattr(ray, "init", init)
    cluster = ray_session.start_ray(num_cpus=1)
    ray_session.stop_ray(cluster)
    assert "second attempt" in cluster.warnings[-1]
    assert os.listdir(short_folder) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_that_stops_the_run_while_ray_starts_is_not_taken_for_a_failure(
    monkeypatch: pytest.MonkeyPatch, short_folder: str, number: signal.Signals
) -> None:
    import ray

    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does, first of all
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(ray, "init", init)
    with preemptible():
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Preempted, match=number.name):
            ray_session.start_ray(num_cpus=1)
        assert signal.getsignal(signal.SIGTERM) is before
    assert os.listdir(short_folder) == []
