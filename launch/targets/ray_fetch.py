"""Results of a run from a Ray cluster whose file system is not visible here, through the dashboard and its token alone.

here                                  the node that ran the driver
submit ray_listing.py  ------------>  link to the run folder under Ray's log folder; paths, sizes, hashes in its output
GET /api/v0/logs/file, one by one <-  the bytes, in pieces
check size and hash, move into place
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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from launch.jobs import FETCHED, is_fetched, new_draft, put_in_place
from launch.targets import JobRecord, ray_listing
from launch.targets.ray import linking_command, run_folder_link
from launch.targets.ray_client import Client, JobDetails
from trainer.errors import ConfigError, InfrastructureError, foreign_errors
from trainer.records import checked

START_TIMEOUT_S = 120.0
LISTING_TIMEOUT_S = 900.0  # hashing a student of hundreds of GB
POLL_S = 1.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True)
class _File:
    path: str  # in the run folder
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


@dataclass(frozen=True, slots=True)
class _Listing:
    """What `ray_listing.py` prints."""

    error: str
    files: list[_File]


def fetch_results(client: Client, record: JobRecord, destination: Path, *, python: str, node_id: str | None) -> int:
    """Bring what `fetch` brings of a run folder of the cluster; returns the number of bytes.

    `node_id`: the node that sees the folder, None for the head. Memory is bounded by one piece of a file; nothing at
    the destination changes until every file has arrived with the hash that the node computed. Raises
    `InfrastructureError` for a folder that is not there and a file that does not arrive whole.
    """
    try:
        return _fetch(client, record, destination, python=python, node_id=node_id)
    except _Replaced:  # by a run that is still working
        return _fetch(client, record, destination, python=python, node_id=node_id)


class _Replaced(InfrastructureError):
    """A file is not the one that was listed."""


def _fetch(client: Client, record: JobRecord, destination: Path, *, python: str, node_id: str | None) -> int:
    node_id, files = _list_results(client, record, python=python, node_id=node_id)
    if not files:
        raise InfrastructureError(f"the run folder {record.folder} holds no results yet")
    total = sum(file.bytes for file in files)
    draft = new_draft(destination)
    refuse_too_large(total, draft)
    for file in files:
        place = f"{run_folder_link(record.job)}/{file.path}"
        _write(client.log_file(node_id, place) if file.bytes else iter(()), file, draft / file.path)
    put_in_place(draft, destination)
    return total


def refuse_too_large(num_bytes: int, destination: Path) -> None:
    """Raises `ConfigError` where the disk has no room for what is fetched."""
    free = shutil.disk_usage(destination).free
    if num_bytes > free:
        raise ConfigError(
            f"the results have {num_bytes / 1e9:.1f} GB, and the disk of {destination.parent} has {free / 1e9:.1f} GB "
            "free: name a folder on another one with --into FOLDER"
        )


def _list_results(
    client: Client, record: JobRecord, *, python: str, node_id: str | None
) -> tuple[str, tuple[_File, ...]]:
    """(node, files that can be read there). What comes from the cluster is checked before it is used."""
    job, script = f"stillhouse-fetch-{secrets.token_hex(8)}", Path(ray_listing.__file__)
    command = shlex.join([python, script.name, record.folder, *FETCHED])
    with tempfile.TemporaryDirectory(prefix="stillhouse-fetch-") as working_dir:
        shutil.copyfile(script, Path(working_dir) / script.name)
        with foreign_errors(f"the cluster at {client.address} did not take a job", error=InfrastructureError):
            client.submit_job(
                entrypoint=f"{linking_command(record.folder, record.job)}; exec {command}",
                submission_id=job,
                runtime_env={"working_dir": working_dir},
                metadata={"stillhouse": "fetch"},
                entrypoint_label_selector={"ray.io/node-id": node_id} if node_id else None,
            )
    try:
        known = _await_end(client, job)
    finally:
        with contextlib.suppress(InfrastructureError):  # one that has ended stays as it is
            client.stop_job(job)
    said = client.log_text(known.driver_node_id, f"job-driver-{job}.log", lines=1)
    with foreign_errors("the cluster lists the results in a way that cannot be read", error=InfrastructureError):
        listing = checked(json.loads(said), _Listing)
    if listing.error:
        raise InfrastructureError(listing.error)
    outside = next((file.path for file in listing.files if not is_fetched(file.path)), None)
    if outside is not None:
        raise InfrastructureError(f"the cluster lists a file that was not asked for: {outside!r}")
    return known.driver_node_id, tuple(listing.files)


def _await_end(client: Client, job: str) -> JobDetails:
    """Of the listing job. Raises `InfrastructureError` where it fails or takes too long."""
    began = time.monotonic()
    while (known := client.get_job_info(job)).status not in ENDED:
        waited = time.monotonic() - began
        if waited > (LISTING_TIMEOUT_S if known.driver_node_id else START_TIMEOUT_S):
            what = "hash the results" if known.driver_node_id else "start the job that lists the results"
            raise InfrastructureError(f"the cluster at {client.address} did not {what} within {waited:.0f} s")
        time.sleep(POLL_S)
    if known.status != "SUCCEEDED":
        raise InfrastructureError(f"the job that lists the results ended: {(known.message or '')[:500]}")
    return known


def _write(pieces: Iterator[bytes], file: _File, target: Path) -> None:
    """What was listed, and nothing that was appended since. Raises `InfrastructureError` where it is something else."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hashed, missing = hashlib.sha256(), file.bytes
    with target.open("wb") as content:
        while missing and (piece := next(pieces, b"")[:missing]):
            missing -= len(piece)
            content.write(piece)
            hashed.update(piece)
    if missing:
        raise InfrastructureError(f"{file.path}: {missing} of {file.bytes} bytes did not arrive; fetch again")
    if hashed.hexdigest() != file.sha256:
        raise _Replaced(f"{file.path}: its hash is not the one on the node; it was replaced meanwhile, fetch again")
