"""What Ray is told, and what its start refuses or names."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from cluster import ray_session, runtime
from trainer.errors import ConfigError, InfrastructureError


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


def test_a_small_shared_memory_is_a_warning(tmp_path: Path) -> None:
    assert "--shm-size" in ray_session.shared_memory_warning(2**60, tmp_path)
    assert ray_session.shared_memory_warning(1, tmp_path) is None
    assert ray_session.shared_memory_warning(None) is None


def test_a_cluster_that_does_not_answer_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    port = runtime.free_port()
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        ray_session.start_ray(num_cpus=1, address=f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        ray_session.start_ray(num_cpus=1)


def test_a_folder_too_long_for_sockets_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="shorter path"):
        ray_session.start_ray(num_cpus=1, temp_dir=tmp_path / ("x" * 60))


def test_a_ray_that_does_not_start_is_named_and_its_folder_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**options: object) -> None:
        assert Path(str(options["_temp_dir"])).is_dir()
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short enough for sockets, unlike tmp_path
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with pytest.raises(InfrastructureError, match=r"load [\d.]+ on \d+ cores.*timed out during startup"):
            ray_session.start_ray(num_cpus=1)
        assert os.listdir(folder) == []
