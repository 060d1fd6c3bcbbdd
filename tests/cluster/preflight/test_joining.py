"""Why a cluster cannot be joined: each reason by name and within seconds, as a run says it."""

from __future__ import annotations

import json
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from raylets import Raylets, raylets

from cluster.lifecycle import ray_token
from cluster.preflight import joining
from trainer.errors import ConfigError

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://10.0.0.1:10001", r"RAY_ADDRESS is ray://10.0.0.1:10001.*HOST:PORT.*stillhouse submit"),
        ("somewhere", "write HOST:PORT"),
        ("no-such-host.invalid:6379", "no Ray cluster answers at no-such-host.invalid:6379"),
    ],
)
def test_an_address_that_leads_nowhere_is_named(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        joining.check_cluster(address)


@pytest.mark.stack
def test_something_else_behind_the_port_is_named_within_seconds() -> None:
    import ray  # noqa: F401 - a busy machine takes seconds for that alone

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(ConfigError, match="does not answer as a Ray cluster"):
            joining.check_cluster(f"127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 35


class Store:
    """The control store of a cluster, with what a test puts there."""

    def __init__(self, *, versions: dict[str, str] | None = None, nodes: tuple[str, ...] = ()) -> None:
        self._versions = versions
        self._nodes = nodes

    def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> bytes | None:
        assert (key, namespace) == joining.METADATA
        return None if self._versions is None else json.dumps(self._versions).encode()

    def get_all_node_info(self, timeout: float) -> dict[str, Any]:
        return {str(i): SimpleNamespace(node_manager_address=address) for i, address in enumerate(self._nodes)}


def test_other_versions_of_ray_or_python_are_named() -> None:
    import ray

    same = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    joining._check_versions("head:6379", Store(versions=same))
    joining._check_versions("head:6379", Store())
    with pytest.raises(ConfigError, match=r"has Ray 2\.1\.0, here .*start them from this one"):
        joining._check_versions("head:6379", Store(versions={**same, "ray_version": "2.1.0"}))
    with pytest.raises(ConfigError, match=r"has Python 3\.9\.1, here 3"):
        joining._check_versions("head:6379", Store(versions={**same, "python_version": "3.9.1"}))


def test_a_machine_that_is_no_node_is_told_how_to_go_on() -> None:
    own = next(e.address for es in psutil.net_if_addrs().values() for e in es if e.family == socket.AF_INET)
    joining._check_member("head:6379", Store(nodes=("203.0.113.7", own)))
    with pytest.raises(ConfigError, match=r"is no node of the Ray cluster at head:6379 \(203\.0\.113\.7\).*submit"):
        joining._check_member("head:6379", Store(nodes=("203.0.113.7",)))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with raylets({}) as made:
        yield made


def join(address: str, **environment: str) -> tuple[str, float]:
    """What a process with this environment is told, and after how long."""
    code = (
        "import os, time\nos.environ.update(CHANGES)\nimport ray\nfrom cluster.lifecycle import ray_session\n"
        "from trainer.errors import ConfigError\nstarted = time.monotonic()\n"
        "try:\n    ray_session.start_ray(num_cpus=0)\n    said = 'joined'\n"
        "except ConfigError as error:\n    said = str(error)\n"
        "print('took', time.monotonic() - started, said)"
    ).replace("CHANGES", repr({"RAY_ADDRESS": address, **environment}))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    found = re.search(r"^took ([\d.]+) (.+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    return found[2], float(found[1])


@pytest.mark.stack
def test_a_wrong_or_missing_token_is_named_as_such_at_once(cluster: Raylets, tmp_path: Path) -> None:
    assert join(cluster.address)[0] == "joined"
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    said, took = join(cluster.address, **{ray_token.TOKEN_PATH: str(wrong)})
    assert f"refuses the token from {wrong}: it is not the cluster's" in said
    assert took < 35
    said, took = join(cluster.address, **{ray_token.MODE: "disabled"})
    assert "wants a token, and this process shows none: set RAY_AUTH_MODE=token" in said
    assert took < 35


@pytest.mark.stack
def test_a_cluster_of_another_version_is_refused_by_its_own_record(cluster: Raylets) -> None:
    from ray._raylet import GcsClient

    key, namespace = joining.METADATA
    client = GcsClient(address=cluster.address)
    record = client.internal_kv_get(key, namespace, timeout=10)
    changed = {**json.loads(record), "ray_version": "2.44.1"}
    client.internal_kv_put(key, json.dumps(changed).encode(), True, namespace, 10)
    try:
        assert "has Ray 2.44.1, here" in join(cluster.address)[0]
    finally:
        client.internal_kv_put(key, record, True, namespace, 10)
