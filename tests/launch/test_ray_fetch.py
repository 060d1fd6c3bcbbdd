"""Fetching from a cluster that sends something else than it declared: nothing at the destination changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.targets import JobRecord, ray_fetch, ray_listing
from launch.targets.ray_client import Client, JobDetails
from trainer.errors import ConfigError, InfrastructureError

CONTENT = b"full"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Cluster(Client):
    """A dashboard whose listing and files are given."""

    def __init__(self, listing: Any, pieces: Iterable[bytes] = (), *, status: str = "SUCCEEDED") -> None:
        self.address = "http://cluster"
        self.listing, self.pieces, self.sent, self.status = listing, pieces, 0, status

    def submit_job(self, **request: Any) -> str:
        return request["submission_id"]

    def stop_job(self, job_id: str) -> bool:
        return False

    def get_job_info(self, job_id: str) -> JobDetails:
        fields = {"driver_node_id": "n", "submission_id": job_id, "status": self.status, "message": "no python"}
        return JobDetails(type="SUBMISSION", entrypoint="x", **fields)

    def log_file(self, node_id: str, name: str, *, lines: int = -1) -> Iterator[bytes]:
        if name.startswith("job-driver-"):
            yield json.dumps(self.listing).encode()
            return
        assert name.startswith("stillhouse-one-1/"), name
        for piece in self.pieces:
            self.sent += len(piece)
            yield piece


def listed(path: Any = "report.html", num_bytes: Any = 4, digest: Any = DIGEST) -> dict[str, Any]:
    return {"error": "", "files": [{"path": path, "bytes": num_bytes, "sha256": digest}]}


def fetch(cluster: Cluster, destination: Path) -> int:
    record = JobRecord("one-1", "ray", "one", "/runs/one")
    return ray_fetch.fetch_results(cluster, record, destination, python="python", node_id=None)


def test_what_is_declared_arrives(tmp_path: Path) -> None:
    cluster = Cluster(listed(), iter([CONTENT]))
    assert fetch(cluster, tmp_path) == 4
    assert (tmp_path / "report.html").read_bytes() == CONTENT


def test_of_a_log_that_grows_meanwhile_arrives_what_was_listed(tmp_path: Path) -> None:
    cluster = Cluster(listed(path="metrics.jsonl"), iter([b"fu", b"ll and more", b"never asked for"]))
    assert fetch(cluster, tmp_path) == 4
    assert (tmp_path / "metrics.jsonl").read_bytes() == CONTENT
    assert cluster.sent == len(b"full and more")


def test_a_file_that_is_replaced_meanwhile_is_listed_and_fetched_again(tmp_path: Path) -> None:
    assert fetch(Cluster(listed(), iter([b"late", CONTENT])), tmp_path) == 4
    assert (tmp_path / "report.html").read_bytes() == CONTENT


def test_a_file_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="2 of 4 bytes did not arrive"):
        fetch(Cluster(listed(), iter([b"fu"])), tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_listing_job_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="lists the results ended: no python"):
        fetch(Cluster(listed(), status="FAILED"), tmp_path)


def test_a_file_larger_than_declared_is_given_up_at_once(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("before")
    endless = Cluster(listed(), (b"x" * 2**20 for _ in range(10**9)))
    with pytest.raises(InfrastructureError, match=r"report\.html: its hash is not the one on the node"):
        fetch(endless, tmp_path)
    assert endless.sent == 2 * 2**20  # it is tried twice
    assert (tmp_path / "report.html").read_text() == "before"
    assert sum(file.stat().st_size for file in (tmp_path / ".fetching").rglob("*") if file.is_file()) <= 4


def test_more_than_the_disk_holds_is_refused_before_a_byte_is_asked_for(tmp_path: Path) -> None:
    cluster = Cluster(listed(num_bytes=10**18), iter([b"x"]))
    with pytest.raises(ConfigError, match=r"1000000000\.0 GB.*--into FOLDER"):
        fetch(cluster, tmp_path)
    assert cluster.sent == 0


@pytest.mark.parametrize(
    "listing", [listed(num_bytes=-1), listed(num_bytes="4"), listed(path=3), listed(digest=None), {"files": []}, []]
)
def test_a_listing_of_another_shape_is_an_error_of_the_cluster(tmp_path: Path, listing: Any) -> None:
    with pytest.raises(InfrastructureError, match="lists the results in a way that cannot be read"):
        fetch(Cluster(listing), tmp_path)


def test_what_the_node_says_of_a_folder_that_is_not_there_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="does not exist on n1"):
        fetch(Cluster({"error": "the run folder /x does not exist on n1", "files": []}), tmp_path)
    with pytest.raises(InfrastructureError, match="holds no results yet"):
        fetch(Cluster({"error": "", "files": []}), tmp_path)


@pytest.mark.parametrize("path", ["../../.bashrc", "/etc/passwd", "student/../../x", "checkpoints/step_1"])
def test_a_file_that_was_not_asked_for_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InfrastructureError, match="not asked for"):
        fetch(Cluster(listed(path=path)), tmp_path)


def test_an_answer_without_end_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(listed())
    monkeypatch.setattr("launch.targets.ray_client.MAX_ANSWER_BYTES", 2**20)
    cluster.pieces = (b"x" * 2**16 for _ in range(10**9))
    with pytest.raises(InfrastructureError, match="sends more than 1 MiB"):
        cluster.log_text("n", "stillhouse-one-1/manifest.json")
    assert cluster.sent <= 2**20 + 2**16


def test_the_node_lists_no_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/id_rsa").write_text("private")
    run = tmp_path / "run"
    run.mkdir()
    (run / "student").symlink_to(tmp_path / "elsewhere")
    (run / "report.html").symlink_to(tmp_path / "elsewhere/id_rsa")
    (run / "metrics.jsonl").write_text("{}")
    assert list(ray_listing.found(str(run), ["report.html", "student", "metrics.jsonl"])) == ["metrics.jsonl"]
