"""Ray's own job client (`ray.job_submission`) with what it lacks: a deadline for every answer, and a bound on its size;
the token from where `find_token` says; one message each for no answer, no token, a wrong one, and other versions; files
of a node as bytes, in pieces.

Imported when a cluster is asked, because it imports Ray.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import ssl
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.job_submission import JobDetails as JobDetails
from ray.job_submission import JobSubmissionClient

from cluster.lifecycle import ray_token
from configs.paths import named_path
from launch.targets.common import NotFound, Unreachable, is_loopback
from trainer.errors import ConfigError, InfrastructureError, foreign_errors

TIMEOUT_S = 30.0  # for one answer, or the next piece of a file
TRANSFER_TIMEOUT_S = 3600
MAX_ANSWER_BYTES = 256 * 2**20
PIECE_BYTES = 1 << 20

HOW_TO_SET_TOKEN = (
    "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token, or give its path with "
    "--with token_path=FILE"
)


class Client(JobSubmissionClient):
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
        self._token, self._token_source = find_token(token_path)
        self.is_open = self._token is None and not is_loopback(parts.hostname)
        """Whether others than this machine's users can reach a cluster that, as far as we know, asks for no token."""
        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        # Not JobSubmissionClient's own, which lets RAY_ADDRESS overrule the address: another cluster than was meant.
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        with foreign_errors("the certificates for https cannot be used"):
            SubmissionClient.__init__(self, self.address, headers=headers, verify=_certificates())

    def check_versions(self) -> None:
        """Raises `ConfigError` where the cluster's Ray or Python is not this machine's."""
        with self._decoding():
            found = self._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
            ray, python = str(found["rayVersion"]), str(found["pythonVersion"])
        own_ray, own_python = importlib.metadata.version("ray"), platform.python_version()
        if ray != own_ray:
            raise ConfigError(
                f"the cluster at {self.address} runs Ray {ray}, this machine has Ray {own_ray}: install the same "
                "version on both"
            )
        if _minor(python) != _minor(own_python):
            raise ConfigError(
                f"the cluster at {self.address} runs Python {python}, this machine Python {own_python}: use Python "
                f"{_minor(python)} here, or start the cluster with {_minor(own_python)}"
            )

    def get_job_info(self, job_id: str) -> JobDetails:
        """What the cluster knows of a submission; raises `NotFound`."""
        try:
            with self._decoding():
                return super().get_job_info(job_id)
        except NotFound:
            raise NotFound(
                f"the cluster at {self.address} does not know the job {job_id}: was it started anew since?"
            ) from None

    def list_jobs(self) -> list[JobDetails]:
        with self._decoding():
            return super().list_jobs()

    def living_nodes(self) -> set[str]:
        """Ids of the nodes that are alive."""
        with self._decoding():
            nodes = self._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
            return {node["raylet"]["nodeId"] for node in nodes if node["raylet"].get("state") == "ALIVE"}

    def log_file(self, node_id: str, name: str, *, lines: int = -1) -> Iterator[bytes]:
        """A file under Ray's log folder of a node, byte for byte, in pieces of at most 1 MiB: its last lines, or all.
        (Ray's own functions join the pieces to one text.)"""
        query = {"node_id": node_id, "filename": name, "lines": lines, "timeout": TRANSFER_TIMEOUT_S}
        response = self._do_request("GET", f"/api/v0/logs/file?{urllib.parse.urlencode(query)}", stream=True)
        if response.status_code != 200:
            self._raise_error(response)
        return self._pieces(response)

    def log_text(self, node_id: str, name: str, *, lines: int = -1) -> bytes:
        """`log_file` in one. Raises `InfrastructureError` where it is larger than any record should be."""
        return self._whole(self.log_file(node_id, name, lines=lines), name)

    def _decoding(self) -> AbstractContextManager[None]:
        """Around the decoding of an answer."""
        return foreign_errors(f"{self.address} answers, but not as the dashboard of a Ray cluster")

    def _do_request(self, method: str, endpoint: str, *, stream: bool = False, **given: Any) -> requests.Response:
        """In place of Ray's, which waits for ever; `stream`: the content has not been read yet."""
        seconds = TIMEOUT_S if method == "GET" else TRANSFER_TIMEOUT_S  # an upload is one message, however long
        try:
            response = requests.request(
                method,
                self.address + endpoint,
                data=given.get("data"),
                json=given.get("json_data"),
                headers=self._headers,
                auth=lambda request: request,  # else a netrc file would replace the token
                verify=self._verify,
                timeout=(seconds, TIMEOUT_S if stream else seconds),
                stream=True,
            )
        except requests.RequestException as error:
            raise Unreachable(
                f"no Ray dashboard answers at {self.address} ({_cause(error)}). Is the cluster up, was it started with "
                "ray[default] installed, is its dashboard reachable from here? Name it with "
                "--with address=http://HOST:8265"
            ) from None
        if response.status_code in (401, 403):
            raise self._refused(response.status_code)
        if not stream:
            response._content = self._whole(self._pieces(response), endpoint)
        return response

    def _pieces(self, response: requests.Response) -> Iterator[bytes]:
        with response:
            try:
                yield from response.iter_content(PIECE_BYTES)
            except requests.RequestException as error:
                raise InfrastructureError(
                    f"the connection to {self.address} broke while reading: {_cause(error)}"
                ) from None

    def _whole(self, pieces: Iterator[bytes], what: str) -> bytes:
        content = bytearray()
        for piece in pieces:
            content += piece
            if len(content) > MAX_ANSWER_BYTES:
                raise InfrastructureError(
                    f"the cluster at {self.address} sends more than {MAX_ANSWER_BYTES >> 20} MiB for {what}"
                )
        return bytes(content)

    def _raise_error(self, response: requests.Response) -> None:
        text = response.text.strip()
        path = urllib.parse.urlsplit(response.url).path
        answers = f"the cluster at {self.address} answers {response.status_code} to {path}"
        if response.status_code == 404:
            raise NotFound(f"{answers}: {text[:300]}")
        reason = text.splitlines()[-1] if text else "no reason given"  # the head sends tracebacks
        raise InfrastructureError(f"{answers}: {reason[:500]}")

    def _refused(self, status: int) -> ConfigError:
        if not self._token and status == 401:
            return ConfigError(
                f"the cluster at {self.address} wants a token and got none (HTTP 401). {HOW_TO_SET_TOKEN}"
            )
        return ConfigError(
            f"the cluster at {self.address} refuses the token from {self._token_source} (HTTP {status}): it is another "
            "cluster's, or it was changed"
        )


def find_token(token_path: str | None, environment: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """(token, where it was found): `token_path`, else what Ray would take. None: the cluster is thought to need none.

    Raises `ConfigError` where a token is asked for and cannot be read, or others may read its file.
    """
    named = environment.get(ray_token.TOKEN_PATH)
    if token_path is not None:
        file, source = named_path("token_path", token_path), token_path
    elif environment.get(ray_token.MODE, "").lower() == "disabled":
        return None, ""
    elif environment.get(ray_token.TOKEN):
        return environment[ray_token.TOKEN].strip(), ray_token.TOKEN
    elif named:  # used without RAY_AUTH_MODE, too: a token file that is named is meant
        file, source = named_path(ray_token.TOKEN_PATH, named), f"{ray_token.TOKEN_PATH}={named}"
    elif (default := ray_token.named_token_file(environment)) is None:
        return None, ""
    elif not default.exists():
        raise ConfigError(f"RAY_AUTH_MODE=token, but there is no token: {default} does not exist. {HOW_TO_SET_TOKEN}")
    else:
        file, source = default, str(default)
    ray_token.refuse_open_token(file)
    with foreign_errors(f"Ray's token file {file} cannot be read"):
        words = file.read_text(encoding="utf-8").split()
    if len(words) != 1:
        raise ConfigError(f"Ray's token file {file} {'holds more than a token' if words else 'is empty'}")
    return words[0], source


def _certificates() -> str | bool:
    """File or folder of the authorities to trust: those of this system, where it has any, as everything else in Python
    does; requests would take those of a package. True: let requests choose."""
    of_system = ssl.get_default_verify_paths()  # SSL_CERT_FILE and SSL_CERT_DIR before the system's own
    return os.environ.get("REQUESTS_CA_BUNDLE") or of_system.cafile or of_system.capath or True


def _cause(error: BaseException) -> str:
    """The operating system's reason, below the layers of requests and urllib3."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
