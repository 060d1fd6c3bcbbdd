"""Results of a run from a Ray cluster whose file system is not visible here, through the dashboard and its token alone.

here                                  the node that ran the driver
submit ray_offer.py  -------------->  links to the files under Ray's log folder; names, sizes, hashes in its output
GET /api/v0/logs/file, one by one <-  the bytes, in pieces
check size and hash, move into place
stop the job  --------------------->  the links are removed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.jobs import FETCHED, is_fetched, new_draft, put_in_place
from launch.targets import ray_offer
from launch.targets.ray_api import RayApi
from trainer.errors import ConfigError, InfrastructureError, foreign_errors

START_TIMEOUT_S = 120.0
OFFER_TIMEOUT_S = 900.0  # hashing a student of hundreds of GB
WITHDRAW_TIMEOUT_S = 60.0
POLL_S = 0.5
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True)
class _Offer:
    """Files that can be read now: (path in the run folder, bytes, sha256)."""

    node_id: str
    box: str
    files: tuple[tuple[str, int, str], ...]


def fetch_results(api: RayApi, folder: str, destination: Path, *, python: str, node_id: str | None) -> int:
    """Bring what `fetch` brings of a run folder of the cluster; returns the number of bytes.

    `node_id`: the node that sees the folder, None for the head. Memory is bounded by one piece of a file; nothing at
    the destination changes until every file has arrived with the hash that the node computed. Raises
    `InfrastructureError` for a folder that is not there and a file that does not arrive whole.
    """
    with _offered(api, folder, python=python, node_id=node_id) as offer:
        if not offer.files:
            raise InfrastructureError(f"the run folder {folder} holds no results yet")
        draft = new_draft(destination)
        refuse_too_large(sum(num_bytes for _, num_bytes, _ in offer.files), draft)
        for path, num_bytes, digest in offer.files:
            _download(api, offer, path, num_bytes, digest, draft / path)
        put_in_place(draft, destination)
    return sum(num_bytes for _, num_bytes, _ in offer.files)


def refuse_too_large(num_bytes: int, destination: Path) -> None:
    """Raises `ConfigError` where the disk has no room for what is offered."""
    free = shutil.disk_usage(destination).free
    if num_bytes > free:
        raise ConfigError(
            f"the results have {num_bytes / 1e9:.1f} GB, and the disk of {destination.parent} has {free / 1e9:.1f} GB "
            "free: name a folder on another one with --into FOLDER"
        )


@contextmanager
def _offered(api: RayApi, folder: str, *, python: str, node_id: str | None) -> Iterator[_Offer]:
    job = f"stillhouse-fetch-{secrets.token_hex(6)}"
    arguments = [python, Path(ray_offer.__file__).name, folder, *FETCHED]
    with tempfile.TemporaryDirectory(prefix="stillhouse-fetch-") as working_dir:
        shutil.copyfile(ray_offer.__file__, Path(working_dir) / Path(ray_offer.__file__).name)
        api.submit(
            entrypoint=f"exec {shlex.join(arguments)}",
            submission_id=job,
            runtime_env={"working_dir": working_dir},
            metadata={"stillhouse": "fetch"},
            entrypoint_label_selector={"ray.io/node-id": node_id} if node_id else None,
        )
    try:
        yield _await_offer(api, job)
    finally:
        _withdraw(api, job)


def _await_offer(api: RayApi, job: str) -> _Offer:
    began = time.monotonic()
    while True:
        known = api.job(job)
        node_id = known.get("driver_node_id")
        said = _said(api, known)
        problem = next((line["error"] for line in said if "error" in line), None)
        if problem:
            raise InfrastructureError(str(problem))
        ready = next((line for line in said if "box" in line), None)
        if ready:
            files = [_offered_file(line) for line in said if "path" in line]
            if len(files) != ready.get("files"):
                raise InfrastructureError(f"the cluster offers {ready.get('files')} files and names {len(files)}")
            outside = next((path for path, _, _ in files if not is_fetched(path)), None)
            if outside is not None:
                raise InfrastructureError(f"the cluster offers a file that was not asked for: {outside!r}")
            return _Offer(node_id, str(ready["box"]), tuple(files))
        if known["status"] in ENDED:
            raise InfrastructureError(f"the job that offers the results ended: {(known.get('message') or '')[:500]}")
        waited = time.monotonic() - began
        if waited > (OFFER_TIMEOUT_S if node_id else START_TIMEOUT_S):
            what = "hash the results" if node_id else "start the job that offers the results"
            raise InfrastructureError(f"the cluster at {api.address} did not {what} within {waited:.0f} s")
        time.sleep(POLL_S)


def _offered_file(line: dict[str, Any]) -> tuple[str, int, str]:
    """(path, bytes, sha256). Raises `InfrastructureError` for a line of another shape: it came from outside."""
    path, num_bytes, digest = line.get("path"), line.get("bytes"), line.get("sha256")
    if not (isinstance(path, str) and isinstance(digest, str) and type(num_bytes) is int and num_bytes >= 0):
        raise InfrastructureError(f"the cluster offers a file in a way that cannot be read: {line!r:.200}")
    return path, num_bytes, digest


def _said(api: RayApi, known: dict[str, Any]) -> list[dict[str, Any]]:
    """What the offering job has printed so far, whole lines only."""
    lines = api.output_tail(known, lines=-1).rpartition("\n")[0].splitlines()
    said = []
    for line in lines:
        if line.startswith(ray_offer.MARK + " {"):
            with foreign_errors("the cluster's offer of the results cannot be read", error=InfrastructureError):
                said.append(json.loads(line.removeprefix(ray_offer.MARK)))
    return said


def _download(api: RayApi, offer: _Offer, path: str, num_bytes: int, digest: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    hashed, received = hashlib.sha256(), 0
    with target.open("wb") as file:
        pieces = api.log_file(offer.node_id, f"{offer.box}/{path}") if num_bytes else iter(())
        for piece in pieces:
            received += len(piece)
            if received > num_bytes:  # a file that grew, or a cluster that sends without end
                raise InfrastructureError(f"{path}: more than its {num_bytes} bytes arrive; fetch again")
            file.write(piece)
            hashed.update(piece)
    if received != num_bytes:
        raise InfrastructureError(f"{path}: {received} of {num_bytes} bytes arrived; fetch again")
    if hashed.hexdigest() != digest:
        raise InfrastructureError(
            f"{path}: its hash is not the one on the node; it was replaced meanwhile, fetch again"
        )


def _withdraw(api: RayApi, job: str) -> None:
    """End the offering job, so that its links are removed."""
    with contextlib.suppress(InfrastructureError):  # what was fetched is here, and the offer ends by itself
        api.stop(job)
        deadline = time.monotonic() + WITHDRAW_TIMEOUT_S
        while api.job(job)["status"] not in ENDED and time.monotonic() < deadline:
            time.sleep(POLL_S)
