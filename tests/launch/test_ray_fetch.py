"""Fetching from a cluster that sends something else than it declared: nothing at the destination changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.targets import ray_fetch, ray_offer
from launch.targets.ray_client import Client, JobDetails
from trainer.errors import ConfigError, InfrastructureError

CONTENT = b"full"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Cluster(Client):
    """A dashboard whose offer and files are given."""

    def __init__(self, offer: Any, pieces: Iterable[bytes] = ()) -> None:
        self.address = "http://cluster"
        self.offer, self.pieces, self.sent, self.status = offer, pieces, 0, "RUNNING"

    def submit_job(self, **request: Any) -> str:
        return request["submission_id"]

    def stop_job(self, job_id: str) -> bool:
        self.status = "STOPPED"
        return True

    def get_job_info(self, job_id: str) -> JobDetails:
        fields = {"driver_node_id": "n", "submission_id": job_id, "status": self.status}
        return JobDetails(type="SUBMISSION", entrypoint="x", **fields)

    def log_file(self, node_id: str, name: str, *, lines: int = -1) -> Iterator[bytes]:
        if name.endswith(f"/{ray_offer.OFFER}"):
            yield json.dumps(self.offer).encode()
            return
        for piece in self.pieces:
            self.sent += len(piece)
            yield piece


def offered(path: Any = "report.html", num_bytes: Any = 4, digest: Any = DIGEST) -> dict[str, Any]:
    return {"error": "", "files": [{"path": path, "bytes": num_bytes, "sha256": digest}]}


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
    "offer", [offered(num_bytes=-1), offered(num_bytes="4"), offered(path=3), offered(digest=None), {"files": []}, []]
)
def test_an_offer_of_another_shape_is_an_error_of_the_cluster(tmp_path: Path, offer: Any) -> None:
    with pytest.raises(InfrastructureError, match="offers the results in a way that cannot be read"):
        fetch(Cluster(offer), tmp_path)


def test_what_the_node_says_of_a_folder_that_is_not_there_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="does not exist on n1"):
        fetch(Cluster({"error": "the run folder /x does not exist on n1", "files": []}), tmp_path)
    with pytest.raises(InfrastructureError, match="holds no results yet"):
        fetch(Cluster({"error": "", "files": []}), tmp_path)


@pytest.mark.parametrize("path", ["../../.bashrc", "/etc/passwd", "student/../../x", "checkpoints/step_1"])
def test_a_file_that_was_not_asked_for_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InfrastructureError, match="not asked for"):
        fetch(Cluster(offered(path=path)), tmp_path)


def test_an_answer_without_end_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(offered())
    monkeypatch.setattr("launch.targets.ray_client.MAX_ANSWER_BYTES", 2**20)
    cluster.pieces = (b"x" * 2**16 for _ in range(10**9))
    with pytest.raises(InfrastructureError, match="sends more than 1 MiB"):
        cluster.log_text("n", "manifest.json")
    assert cluster.sent <= 2**20 + 2**16


def test_the_node_offers_no_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/id_rsa").write_text("private")
    run = tmp_path / "run"
    run.mkdir()
    (run / "student").symlink_to(tmp_path / "elsewhere")
    (run / "report.html").symlink_to(tmp_path / "elsewhere/id_rsa")
    (run / "metrics.jsonl").write_text("{}")
    assert list(ray_offer.found(str(run), ["report.html", "student", "metrics.jsonl"])) == ["metrics.jsonl"]
