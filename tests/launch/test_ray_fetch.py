"""Fetching from a cluster that sends something else than it declared: nothing at the destination changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.targets import ray_fetch, ray_offer
from launch.targets.ray_api import RayApi
from trainer.errors import ConfigError, InfrastructureError

CONTENT = b"full"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Cluster(RayApi):
    """A dashboard whose offer and files are given."""

    def __init__(self, lines: list[dict[str, Any]], pieces: Iterable[bytes] = ()) -> None:
        self.address = "http://cluster"
        self.lines, self.pieces, self.sent, self.status = lines, pieces, 0, "RUNNING"

    def submit(self, **request: Any) -> None: ...

    def stop(self, job: str) -> None:
        self.status = "STOPPED"

    def job(self, job: str) -> dict[str, Any]:
        return {"driver_node_id": "n", "submission_id": job, "status": self.status}

    def output(self, known: dict[str, Any], *, lines: int = -1) -> Iterator[bytes]:
        yield "".join(f"{ray_offer.MARK} {json.dumps(line)}\n" for line in self.lines).encode()

    def log_file(self, node_id: str, name: str, *, lines: int = -1) -> Iterator[bytes]:
        for piece in self.pieces:
            self.sent += len(piece)
            yield piece


def offered(path: Any = "report.html", num_bytes: Any = 4, digest: Any = DIGEST) -> list[dict[str, Any]]:
    return [{"path": path, "bytes": num_bytes, "sha256": digest}, {"box": "b", "files": 1}]


def fetch(cluster: Cluster, destination: Path) -> int:
    return ray_fetch.fetch_results(cluster, "/runs/one", destination, python="python", node_id=None)


def test_what_is_declared_arrives(tmp_path: Path) -> None:
    cluster = Cluster(offered(), iter([CONTENT]))
    assert fetch(cluster, tmp_path) == 4
    assert (tmp_path / "report.html").read_bytes() == CONTENT


def test_a_file_larger_than_declared_is_given_up_at_once(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("before")
    endless = Cluster(offered(), (b"x" * 2**20 for _ in range(10**9)))
    with pytest.raises(InfrastructureError, match=r"report\.html: more than its 4 bytes"):
        fetch(endless, tmp_path)
    assert endless.sent == 2**20
    assert (tmp_path / "report.html").read_text() == "before"
    assert sum(file.stat().st_size for file in (tmp_path / ".fetching").rglob("*") if file.is_file()) <= 4


def test_more_than_the_disk_holds_is_refused_before_a_byte_is_asked_for(tmp_path: Path) -> None:
    cluster = Cluster(offered(num_bytes=10**18), iter([b"x"]))
    with pytest.raises(ConfigError, match=r"1000000000\.0 GB.*--into FOLDER"):
        fetch(cluster, tmp_path)
    assert cluster.sent == 0


@pytest.mark.parametrize(
    "lines", [offered(num_bytes=-1), offered(num_bytes="4"), offered(path=3), offered(digest=None)]
)
def test_an_offer_of_another_shape_is_an_error_of_the_cluster(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    with pytest.raises(InfrastructureError, match="offers a file in a way that cannot be read"):
        fetch(Cluster(lines), tmp_path)


@pytest.mark.parametrize("path", ["../../.bashrc", "/etc/passwd", "student/../../x", "checkpoints/step_1"])
def test_a_file_that_was_not_asked_for_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InfrastructureError, match="not asked for"):
        fetch(Cluster(offered(path=path)), tmp_path)


def test_an_output_without_end_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster([])
    monkeypatch.setattr("launch.targets.ray_api.MAX_ANSWER_BYTES", 2**20)
    monkeypatch.setattr(cluster, "output", lambda known, lines: (b"x" * 2**16 for _ in range(10**9)))
    assert cluster.output_tail({}, lines=-1) == ""


def test_the_node_offers_no_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/id_rsa").write_text("private")
    run = tmp_path / "run"
    run.mkdir()
    (run / "student").symlink_to(tmp_path / "elsewhere")
    (run / "report.html").symlink_to(tmp_path / "elsewhere/id_rsa")
    (run / "metrics.jsonl").write_text("{}")
    assert list(ray_offer.found(str(run), ["report.html", "student", "metrics.jsonl"])) == ["metrics.jsonl"]
