"""Results of a run from a Ray cluster whose file system is not visible here, through the dashboard and its token alone.

here                                  the node that ran the driver
submit ray_offer.py  -------------->  links to the files under Ray's log folder; paths, sizes, hashes in offer.json
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
from typing import Annotated

from pydantic import Field

from launch.jobs import FETCHED, is_fetched, new_draft, put_in_place
from launch.targets import ray_offer
from launch.targets.common import wait_until
from launch.targets.ray_client import Client
from trainer.errors import ConfigError, InfrastructureError, foreign_errors
from trainer.records import checked

START_TIMEOUT_S = 120.0
OFFER_TIMEOUT_S = 900.0  # hashing a student of hundreds of GB
WITHDRAW_TIMEOUT_S = 60.0
POLL_S = 1.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True)
class _File:
    path: str  # in the run folder
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


@dataclass(frozen=True, slots=True)
class _Offer:
    """What offer.json says."""

    error: str
    files: list[_File]


def fetch_results(client: Client, folder: str, destination: Path, *, python: str, node_id: str | None) -> int:
    """Bring what `fetch` brings of a run folder of the cluster; returns the number of bytes.

    `node_id`: the node that sees the folder, None for the head. Memory is bounded by one piece of a file; nothing at
    the destination changes until every file has arrived with the hash that the node computed. Raises
    `InfrastructureError` for a folder that is not there and a file that does not arrive whole.
    """
    with _offering_job(client, folder, python=python, node_id=node_id) as job:
        node_id, files = _await_offer(client, job)
        total = sum(file.bytes for file in files)
        if not files:
            raise InfrastructureError(f"the run folder {folder} holds no results yet")
        draft = new_draft(destination)
        refuse_too_large(total, draft)
        for file in files:
            pieces = client.log_file(node_id, f"{job}/{file.path}") if file.bytes else iter(())
            _write(pieces, file, draft / file.path)
        put_in_place(draft, destination)
    return total


def refuse_too_large(num_bytes: int, destination: Path) -> None:
    """Raises `ConfigError` where the disk has no room for what is offered."""
    free = shutil.disk_usage(destination).free
    if num_bytes > free:
        raise ConfigError(
            f"the results have {num_bytes / 1e9:.1f} GB, and the disk of {destination.parent} has {free / 1e9:.1f} GB "
            "free: name a folder on another one with --into FOLDER"
        )


@contextmanager
def _offering_job(client: Client, folder: str, *, python: str, node_id: str | None) -> Iterator[str]:
    """Inside, a job offers the folder, in a box that is called as the job."""
    job, script = f"stillhouse-fetch-{secrets.token_hex(8)}", Path(ray_offer.__file__)
    with tempfile.TemporaryDirectory(prefix="stillhouse-fetch-") as working_dir:
        shutil.copyfile(script, Path(working_dir) / script.name)
        with foreign_errors(f"the cluster at {client.address} did not take a job", error=InfrastructureError):
            client.submit_job(
                entrypoint=f"exec {shlex.join([python, script.name, folder, job, *FETCHED])}",
                submission_id=job,
                runtime_env={"working_dir": working_dir},
                metadata={"stillhouse": "fetch"},
                entrypoint_label_selector={"ray.io/node-id": node_id} if node_id else None,
            )
    try:
        yield job
    finally:
        with contextlib.suppress(InfrastructureError):  # what was fetched is here, and the offer ends by itself
            client.stop_job(job)
            over = lambda: client.get_job_info(job).status in ENDED  # noqa: E731
            wait_until(over, seconds=WITHDRAW_TIMEOUT_S, poll_s=POLL_S)


def _await_offer(client: Client, job: str) -> tuple[str, list[_File]]:
    """(node, files that can be read there now). What comes from the cluster is believed only as far as it goes."""
    began = time.monotonic()
    while True:
        known = client.get_job_info(job)
        if known.driver_node_id:
            with contextlib.suppress(InfrastructureError):  # not written yet
                said = client.log_text(known.driver_node_id, f"{job}/{ray_offer.OFFER}")
                break
        if known.status in ENDED:
            raise InfrastructureError(f"the job that offers the results ended: {(known.message or '')[:500]}")
        waited = time.monotonic() - began
        if waited > (OFFER_TIMEOUT_S if known.driver_node_id else START_TIMEOUT_S):
            what = "hash the results" if known.driver_node_id else "start the job that offers the results"
            raise InfrastructureError(f"the cluster at {client.address} did not {what} within {waited:.0f} s")
        time.sleep(POLL_S)
    with foreign_errors("the cluster offers the results in a way that cannot be read", error=InfrastructureError):
        offer = checked(json.loads(said), _Offer)
    if offer.error:
        raise InfrastructureError(offer.error)
    outside = next((file.path for file in offer.files if not is_fetched(file.path)), None)
    if outside is not None:
        raise InfrastructureError(f"the cluster offers a file that was not asked for: {outside!r}")
    return known.driver_node_id, offer.files


def _write(pieces: Iterator[bytes], file: _File, target: Path) -> None:
    """Raises `InfrastructureError` where what comes is not what was offered."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hashed, received = hashlib.sha256(), 0
    with target.open("wb") as content:
        for piece in pieces:
            received += len(piece)
            if received > file.bytes:  # a file that grew, or a cluster that sends without end
                raise InfrastructureError(f"{file.path}: more than its {file.bytes} bytes arrive; fetch again")
            content.write(piece)
            hashed.update(piece)
    if received != file.bytes:
        raise InfrastructureError(f"{file.path}: {received} of {file.bytes} bytes arrived; fetch again")
    if hashed.hexdigest() != file.sha256:
        raise InfrastructureError(
            f"{file.path}: its hash is not the one on the node; it was replaced meanwhile, fetch again"
        )
