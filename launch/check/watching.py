"""What `check` asks of what watches a run: the webhook and the command of `notify:`, the port of metrics."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from functools import partial
from urllib.parse import SplitResult, urlsplit

from cluster.lifecycle.ray_session import refuse_used_port
from cluster.preflight.finding import Finding, Silence, attempt, bounded, warning
from configs.notify import Notify
from configs.schema import Run
from trainer.errors import ConfigError

CONNECT_S = 3.0
ANSWER_S = 5.0  # with the name server's
PORTS = {"http": 80, "https": 443}


def examine_notify(run: Run) -> Iterator[Finding]:
    """Also what will be told, and to whom. Nothing is sent."""
    notify = run.notify
    if notify is None:
        return
    told = " and ".join(filter(None, [", ".join(notify.on[:-1]), notify.on[-1]]))
    if notify.webhook is not None:
        found = attempt("notify", partial(webhook_parts, notify), lambda: f"{told} are told to {shown(notify)}")
        yield found
        if found.status == "ok" and (reason := unreachable(webhook_parts(notify))) is not None:
            yield warning("notify", f"notify.webhook: {shown(notify)} does not answer from here ({reason})")
    if notify.command is not None:
        yield attempt("notify", partial(find_program, notify.command), lambda: f"{told} are told to {notify.command!r}")


def examine_metrics(run: Run) -> Iterator[Finding]:
    """The port of report.prometheus_port, where the run would start a Ray that listens at it."""
    port = run.report.prometheus_port
    if port is None:
        return
    if os.environ.get("RAY_ADDRESS"):
        text = "report.prometheus_port: not used, since the cluster at RAY_ADDRESS serves its metrics at its own ports"
        yield warning("metrics", text)
        return
    say = f"served at port {port} of this machine, to whoever reaches it"
    yield attempt("metrics", partial(refuse_used_port, port), lambda: say)


def webhook_parts(notify: Notify) -> SplitResult:
    """Of the webhook's address. Raises `ConfigError`."""
    try:
        return urlsplit(notify.address(os.environ) or "")
    except ValueError as error:
        raise ConfigError(f"notify.webhook: {error}") from None


def shown(notify: Notify) -> str:
    """The webhook by its host alone: the rest of an address may be a secret."""
    parts = webhook_parts(notify)
    source = f" (its address is in {', '.join(notify.variables)})" if notify.variables else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{source}"


def unreachable(parts: SplitResult) -> str | None:
    """Why nobody listens there, or at the proxy on the way; None where somebody does. A name server that does not
    answer is not waited for."""
    try:
        return next(bounded((_refusal_of(one) for one in (parts,)), first_s=ANSWER_S, then_s=ANSWER_S))
    except Silence:
        return "no answer"


def _refusal_of(parts: SplitResult) -> str | None:
    assert parts.hostname is not None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        socket.create_connection((parts.hostname, parts.port or PORTS[parts.scheme]), timeout=CONNECT_S).close()
    except (OSError, ValueError, KeyError) as error:
        return getattr(error, "strerror", None) or type(error).__name__
    return None


def find_program(command: str | tuple[str, ...]) -> None:
    """Raises `ConfigError` where the program is not there, or where text is nothing that the shell reads."""
    if isinstance(command, tuple):
        if shutil.which(command[0]) is None:
            raise ConfigError(f"notify.command.0: there is no program {command[0]!r} here, on PATH or at that path")
        return
    read = subprocess.run(["/bin/sh", "-nc", command], capture_output=True, text=True, timeout=10, check=False)
    if read.returncode != 0:
        said = read.stderr.strip().rpartition(": ")[2] or f"exit code {read.returncode}"
        raise ConfigError(f"notify.command: the shell cannot read {command!r}: {said}")
    first = command.split()[0]
    if re.fullmatch(r"[\w./-]+", first):
        known = ["/bin/sh", "-c", 'command -v "$0"', first]
        if subprocess.run(known, capture_output=True, timeout=10, check=False).returncode != 0:
            raise ConfigError(f"notify.command: there is no program {first!r} here, on PATH or at that path")
