"""Why a Ray cluster cannot be joined, found out before it is tried: each reason is named, and within seconds.

    nobody there -> not Ray -> no token or a wrong one -> other versions -> this machine is no node of it

Ray itself waits for most of these, or says only that it failed to connect.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import threading
from typing import Any

import psutil

from cluster.lifecycle import ray_token
from trainer.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 12.0
METADATA = (b"CLUSTER_METADATA", b"cluster")
SUBMIT = "submit the run from here, `stillhouse submit CONFIG --to ray`"


def check_cluster(address: str) -> None:
    """Raises `ConfigError` for a cluster at `address` (HOST:PORT) that this process cannot join. Reads Ray's variables
    of this process; `auto` is the cluster of this machine, as Ray announces it here."""
    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS is {address}: a run needs the address of the cluster itself, HOST:PORT as `ray start` prints "
            f"it, on a machine that is a node of it; or {SUBMIT}"
        )
    if address == "auto":
        address = _announced()
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"RAY_ADDRESS is {address}: write HOST:PORT, as `ray start` prints it, or auto")
    _connect(address, host, int(port))
    client = _client(address)
    _check_versions(address, client)
    _check_member(address, client)


def _announced() -> str:
    """The address of the cluster that runs on this machine."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if found is None:
        raise ConfigError("RAY_ADDRESS is auto, and no Ray cluster runs on this machine: start one, or unset it")
    return found


def _connect(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error.strerror or error}). Check RAY_ADDRESS, and whether the head "
            "runs and its port is open from here"
        ) from None


def _client(address: str) -> Any:
    """Of the cluster's control store; made in a thread, because it insists for 40 s where something else listens."""
    from ray._raylet import GcsClient
    from ray.exceptions import AuthenticationError, RayError

    made: list[Any] = []

    def make() -> None:
        try:
            made.append(GcsClient(address=address))
        except RayError as error:
            made.append(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(ANSWER_TIMEOUT_S)
    if not made:
        raise ConfigError(f"something listens at {address}, and it does not answer as a Ray cluster: check RAY_ADDRESS")
    if isinstance(made[0], AuthenticationError):
        raise ConfigError(f"the Ray cluster at {address} {_what_about_the_token()}") from None
    if isinstance(made[0], RayError):
        raise ConfigError(f"the Ray cluster at {address} does not answer: {made[0]}") from None
    return made[0]


def _what_about_the_token() -> str:
    """The reason why it refuses, seen from here."""
    if not ray_token.uses_token(os.environ):
        return (
            f"wants a token, and this process shows none: set {ray_token.MODE}=token and {ray_token.TOKEN_PATH} to a "
            "file with the token of its nodes, mode 0600"
        )
    file = ray_token.named_token_file(os.environ)
    source = f"from {file}" if file is not None else f"in {ray_token.TOKEN}"
    return f"refuses the token {source}: it is not the cluster's. Copy the one that its nodes were started with"


def _check_versions(address: str, client: Any) -> None:
    import ray

    stored = client.internal_kv_get(*METADATA, timeout=ANSWER_TIMEOUT_S)
    if stored is None:
        return
    theirs = json.loads(stored)
    mine = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    differing = [
        f"{key.removesuffix('_version').capitalize()} {theirs[key]}, here {version}"
        for key, version in mine.items()
        if theirs.get(key, version) != version
    ]
    if differing:
        raise ConfigError(
            f"the Ray cluster at {address} has {' and '.join(differing)}: Ray joins equal versions only. Use the "
            "environment that its nodes were started from, or start them from this one"
        )


def _check_member(address: str, client: Any) -> None:
    """A driver talks to Ray through a node of its own machine; without one `ray.init` waits for ever."""
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    nodes = [info.node_manager_address for info in client.get_all_node_info(timeout=ANSWER_TIMEOUT_S).values()]
    if nodes and not own & set(nodes):
        here = ", ".join(sorted(one for one in own if one.count(".") == 3 and not one.startswith("127.")))
        raise ConfigError(
            f"this machine ({here}) is no node of the Ray cluster at {address} ({', '.join(sorted(set(nodes)))}): "
            f"{SUBMIT}, or make it one, `ray start --address {address}`"
        )
