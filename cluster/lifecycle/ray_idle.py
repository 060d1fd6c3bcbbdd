"""What a Ray that serves one run on one machine is started without: services and workers that nobody would use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

IDLE_SERVICES = ("start_monitor", "start_api_server", "start_log_monitor")
"""Methods of Ray's `Node`."""

NO_ORPHANED_ERRORS = ("RAY_IGNORE_UNHANDLED_ERRORS", "1")
"""Of several calls that fail at once one is told; of the others, which nobody waits for any more, Ray would print
tracebacks around it."""

NO_SPARE_WORKERS = ("RAY_prestart_worker_first_driver", "0")
"""Ray would start a Python process per CPU slot before anybody asks for one. The roles of a run have environments of
their own, so none of them ever runs in such a process."""


@contextlib.contextmanager
def without_idle_services() -> Iterator[None]:
    """A Ray started inside has none of the three services that a run on one machine has no use for: a scaler of
    clusters, a server of a dashboard that is off, a follower of logs that nobody asked to see. Each is a Python process
    (180 MB together), and `ray.init` waits for the second.

    `ray start` has switches for them, hidden ones; `ray.init` has none.
    """
    from ray._private.node import Node

    with contextlib.ExitStack() as patched:
        for start in IDLE_SERVICES:
            patched.enter_context(mock.patch.object(Node, start, _start_nothing))
        yield


def _start_nothing(node: Any, **_: Any) -> None:
    """In the place of a method of Ray's `Node`."""
