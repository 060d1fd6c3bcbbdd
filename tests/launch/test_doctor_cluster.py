"""`stillhouse doctor` of a Ray cluster: two nodes that share this machine, with a token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from raylets import OBJECT_STORE_BYTES, ray_cluster
from tiny_runs import stillhouse

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    with ray_cluster(num_cpus=2) as (nodes, _):
        nodes.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)
        yield nodes.address


def test_every_node_and_the_network_between_them_are_looked_at(two_nodes: str, tmp_path: Path) -> None:
    result = stillhouse("doctor", "--address", two_nodes, timeout_s=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "joined " + two_nodes in result.stdout
    assert "2 alive" in result.stdout
    assert result.stdout.count("the same packages and the same code") == 2
    assert "all reach" in result.stdout
    assert "gloo             2 nodes joined in" in result.stdout
    assert "MB/s a node" in result.stdout
    assert result.stdout.count("more things are as they should be") == 1, "the own node is this machine"
    assert "\x1b" not in result.stdout


def test_a_wrong_token_is_named(two_nodes: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("cd34" * 16)
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_TOKEN": ""}
    result = stillhouse("doctor", "--address", two_nodes, timeout_s=400, **wrong)
    assert result.returncode == 1, result.stdout
    assert "token" in result.stdout.partition("the cluster")[2]
    assert os.environ.get("RAY_AUTH_TOKEN_PATH", "-") not in result.stdout
