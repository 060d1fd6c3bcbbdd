"""The HTTP side of a Ray cluster as a machine that is no member of it sees it: token, versions, jobs, log files.

A file of its own because `ray.init` needs a member of the cluster, while everything here needs one address and the
token. Reading goes through plain HTTP, in pieces and with deadlines; submitting is left to Ray's own client, which
packs and uploads the working directory.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import ipaddress
import json
import logging
import os
import platform
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import ray_token
from configs.paths import named_path
from trainer.errors import ConfigError, InfrastructureError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

TIMEOUT_S = 30.0
TRANSFER_TIMEOUT_S = 3600
MAX_ANSWER_BYTES = 256 * 2**20
PIECE_BYTES = 1 << 20
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"

HOW_TO_SET_TOKEN = (
    "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token, or give its path with "
    "--with token_path=FILE"
)


class Unreachable(ConfigError):
    """Nobody answers; of an address that did answer a moment ago, it may be busy."""


class NotFound(InfrastructureError):
    """The cluster does not know what was asked for."""


@dataclass(frozen=True, slots=True)
class Versions:
    """Of a cluster, as its head says."""

    ray: str
    python: str


class RayApi:
    """One cluster by the address of its dashboard, such as `http://127.0.0.1:8265`.

    Every call raises `ConfigError` for an address that does not answer and for a token that is missing or wrong, each
    named as what it is, and `InfrastructureError` for anything else the cluster refuses.
    """

    def __init__(self, address: str, *, token_path: str | None) -> None:
        self.address = address.rstrip("/")
        parts = urllib.parse.urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path:
            raise ConfigError(
                f"address: {address} is not the address of a Ray dashboard; write it like http://127.0.0.1:8265 "
                "(port 8265, not the 6379 of ray start)"
            )
        self._host = parts.hostname
        self._scheme = parts.scheme
        self._token, self._token_source = find_token(token_path)

    def check(self) -> Versions:
        """Whether the cluster answers, lets us in, and runs our versions. Raises `ConfigError` for each that fails."""
        ray = self._versions()
        ours = Versions(importlib.metadata.version("ray"), platform.python_version())
        if ray.ray != ours.ray:
            raise ConfigError(
                f"the cluster at {self.address} runs Ray {ray.ray}, this machine has Ray {ours.ray}: install the same "
                "version on both"
            )
        if _minor(ray.python) != _minor(ours.python):
            raise ConfigError(
                f"the cluster at {self.address} runs Python {ray.python}, this machine Python {ours.python}: use "
                f"Python {_minor(ray.python)} here, or start the cluster with {_minor(ours.python)}"
            )
        return ray

    @property
    def is_open(self) -> bool:
        """Whether others than this machine's users can reach a cluster that, as far as we know, asks for no token."""
        return self._token is None and not is_loopback(self._host)

    def client(self) -> JobSubmissionClient:
        """Ray's own client, for submitting and for following logs."""
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        # Ray lets RAY_ADDRESS and RAY_API_SERVER_ADDRESS overrule what it is given: another cluster than was checked.
        before = os.environ.get(ADDRESS_VARIABLE)
        os.environ[ADDRESS_VARIABLE] = self.address
        try:
            return JobSubmissionClient(self.address, headers=self._headers())
        finally:
            del os.environ[ADDRESS_VARIABLE]
            if before is not None:
                os.environ[ADDRESS_VARIABLE] = before

    def submit(self, **request: Any) -> None:
        """Upload the working directory, where the cluster does not have it yet, and start a job: the arguments of
        `JobSubmissionClient.submit_job`."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            self.client().submit_job(**request)
        except (RuntimeError, ValueError, AuthenticationError, requests.RequestException) as error:
            text = str(error).strip().splitlines()
            reason = text[-1] if text else type(error).__name__
            raise InfrastructureError(f"the cluster at {self.address} did not take the job: {reason[:500]}") from None

    def job(self, job: str) -> dict[str, Any]:
        """What the cluster knows of a submission; raises `NotFound`."""
        return self._json(f"/api/jobs/{urllib.parse.quote(job)}")

    def jobs(self) -> list[dict[str, Any]]:
        return self._json("/api/jobs/")

    def stop(self, job: str) -> None:
        """Ask for a SIGTERM of the entrypoint; returns at once."""
        with self._open(f"/api/jobs/{urllib.parse.quote(job)}/stop", method="POST"):
            pass

    def living_nodes(self) -> set[str]:
        """Ids of the nodes that are alive."""
        nodes = self._json("/nodes?view=summary")["data"]["summary"]
        return {node["raylet"]["nodeId"] for node in nodes if node["raylet"].get("state") == "ALIVE"}

    def output(self, known: dict[str, Any], *, lines: int = -1) -> Iterator[bytes]:
        """What the driver of a job, given as `job` returns it, has written so far: the last lines, -1 for all. Empty
        before the driver has begun."""
        node_id = known.get("driver_node_id")
        if node_id:
            yield from self.log_file(node_id, f"job-driver-{known['submission_id']}.log", lines=lines)

    def output_tail(self, known: dict[str, Any], *, lines: int) -> str:
        """The last lines of a driver's output; "" where there is none, its node is gone, or it has no end."""
        try:
            return _whole(self.output(known, lines=lines), "the driver's output", self.address).decode(
                "utf-8", "replace"
            )
        except InfrastructureError:
            return ""

    def log_file(self, node_id: str, name: str, *, lines: int = -1) -> Iterator[bytes]:
        """A file under Ray's log folder of a node, byte for byte, in pieces of at most 1 MiB."""
        query = {"node_id": node_id, "filename": name, "lines": lines, "timeout": TRANSFER_TIMEOUT_S}
        with self._open(f"/api/v0/logs/file?{urllib.parse.urlencode(query)}") as response:
            while piece := _read(response, self.address):
                yield piece

    def _versions(self) -> Versions:
        version = self._json("/api/version")
        found = self._json("/api/v0/cluster_metadata")["data"]
        if "ray_version" not in version or "pythonVersion" not in found:
            raise ConfigError(f"{self.address} answers, but not as the dashboard of a Ray cluster")
        return Versions(version["ray_version"], found["pythonVersion"])

    def _json(self, path: str) -> Any:
        with self._open(path) as response:
            content = _whole(iter(lambda: _read(response, self.address), b""), path, self.address)
        try:
            return json.loads(content)
        except ValueError:
            raise ConfigError(
                f"{self.address} answers, but not as the dashboard of a Ray cluster ({path} is no JSON). Is the port "
                "that of the dashboard, 8265 unless set otherwise?"
            ) from None

    @contextmanager
    def _open(self, path: str, *, method: str = "GET") -> Iterator[http.client.HTTPResponse]:
        request = urllib.request.Request(f"{self.address}{path}", method=method, headers=self._headers())
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(2000).decode("utf-8", "replace").strip()
            raise self._refused(error.code, text, path) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        with response:
            yield response

    def _refused(self, status: int, text: str, path: str) -> ConfigError | InfrastructureError:
        if status == 401:
            return ConfigError(
                f"the cluster at {self.address} wants a token and got none (HTTP 401). {HOW_TO_SET_TOKEN}"
                if not self._token
                else f"the cluster at {self.address} refuses the token from {self._token_source} (HTTP 401): it is "
                "another cluster's, or it was changed"
            )
        if status == 403:
            return ConfigError(
                f"the cluster at {self.address} refuses the token from {self._token_source} (HTTP 403): it is another "
                "cluster's, or it was changed"
            )
        if status == 404:
            return NotFound(f"the cluster at {self.address} answers 404 to {path}: {text[:300]}")
        reason = text.splitlines()[-1] if text else "no reason given"  # the head sends tracebacks
        return InfrastructureError(f"the cluster at {self.address} answers {status} to {path}: {reason[:500]}")

    def _unreachable(self, error: Exception) -> Unreachable:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = (cause.strerror or str(cause)) if isinstance(cause, OSError) else str(cause)
        return Unreachable(
            f"no Ray dashboard answers at {self.address} ({reason or type(cause).__name__}). Is the cluster up, was it "
            "started with ray[default] installed, is its dashboard reachable from here? Name it with --with address=http://HOST:8265"
        )

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}


def find_token(token_path: str | None, environment: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """(token, where it was found): `token_path`, else what Ray would take. None: the cluster is thought to need none.

    Raises `ConfigError` where a token is asked for and cannot be read, or others may read its file.
    """
    if token_path is not None:
        return _read_token(named_path("token_path", token_path)), token_path
    mode = environment.get(ray_token.MODE, "").lower()
    if mode == "disabled":
        return None, ""
    if environment.get(ray_token.TOKEN):
        return environment[ray_token.TOKEN].strip(), ray_token.TOKEN
    named = environment.get(ray_token.TOKEN_PATH)
    if named:  # used without RAY_AUTH_MODE, too: whoever names a token means it
        return _read_token(named_path(ray_token.TOKEN_PATH, named)), f"{ray_token.TOKEN_PATH}={named}"
    default = ray_token.named_token_file(environment)
    if default is None:
        return None, ""
    if not default.exists():
        raise ConfigError(f"RAY_AUTH_MODE=token, but there is no token: {default} does not exist. {HOW_TO_SET_TOKEN}")
    return _read_token(default), str(default)


def _read_token(file: Path) -> str:
    ray_token.refuse_open_token(file)
    try:
        words = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"Ray's token file {file} cannot be read: {reason}") from None
    if len(words) != 1:
        raise ConfigError(f"Ray's token file {file} {'holds more than a token' if words else 'is empty'}")
    return words[0]


def _whole(pieces: Iterator[bytes], what: str, address: str) -> bytes:
    """An answer in memory. Raises `InfrastructureError` where it is larger than any answer should be."""
    content = bytearray()
    for piece in pieces:
        content += piece
        if len(content) > MAX_ANSWER_BYTES:
            raise InfrastructureError(
                f"the cluster at {address} sends more than {MAX_ANSWER_BYTES >> 20} MiB for {what}"
            )
    return bytes(content)


def _read(response: http.client.HTTPResponse, address: str) -> bytes:
    try:
        return response.read1(PIECE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise InfrastructureError(
            f"the connection to {address} broke while reading: {error or type(error).__name__}"
        ) from None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
