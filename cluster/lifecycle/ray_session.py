"""Ray as a run needs it: what its processes are told, and how a cluster is started, joined and left.

no address   ->  a Ray of this machine alone, in a folder of its own, ended to the last process
an address   ->  a cluster that was there before, checked first (`cluster.preflight.joining`), left as it was
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil

from cluster.lifecycle import ray_token
from cluster.lifecycle.guard import Guard
from cluster.lifecycle.ray_idle import NO_ORPHANED_ERRORS, NO_SPARE_WORKERS, without_idle_services
from cluster.preflight.finding import examine
from cluster.preflight.joining import check_cluster
from cluster.preflight.machine import Needs, looks
from cluster.runtime import cache_folder
from trainer.errors import ConfigError, InfrastructureError, StillhouseError

SMALL_MACHINE_BYTES = 32 * 2**30
MAX_TEMP_DIR = 43  # a unix socket's path has 107 characters, of which Ray's session folder takes 64


@dataclass(frozen=True, slots=True)
class RayCluster:
    """The cluster this process is connected to."""

    address: str
    owned: bool  # started here, and to be ended here
    processes: tuple[int, ...]  # pids of what was started, their children not counted
    temp_dir: Path | None  # made here, and to be removed
    warnings: tuple[str, ...]
    guard: Guard | None = None  # cleans up temp_dir and what runs there, whatever becomes of this process


def start_ray(
    *,
    num_cpus: int,
    address: str | None = None,
    num_gpus: int | None = None,
    object_store_bytes: int | None = None,
    metrics_port: int | None = None,
) -> RayCluster:
    """Join the cluster at `address` (or RAY_ADDRESS), or start one of this machine where neither is given.

    `num_cpus` is the number of slots that the roles need: a role is a logical slot, so a cluster started here has at
    least that many, cores or no cores. `num_gpus` None: Ray counts them. "local" as address never joins anything.
    `metrics_port`: where a cluster started here serves its metrics; None: nowhere.
    """
    os.environ.setdefault(*NO_ORPHANED_ERRORS)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        return _join_ray(address)
    if metrics_port is not None:
        refuse_used_port(metrics_port)
    start = partial(_start_here, num_cpus, num_gpus, object_store_bytes, metrics_port)
    try:
        return start()
    except InfrastructureError as error:
        # Its processes get 30 s from Ray, whatever the machine is doing at that moment.
        cluster = start()
        return replace(cluster, warnings=(*cluster.warnings, f"Ray started at the second attempt only: {error}"))


def refuse_used_port(port: int) -> None:
    """Raises `ConfigError` where another program listens at the port that metrics are to have."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"report.prometheus_port: {port} cannot be listened at on this machine ({error.strerror}); another run "
                "may have it: name another port"
            ) from None


def _start_here(
    num_cpus: int, num_gpus: int | None, object_store_bytes: int | None, metrics_port: int | None
) -> RayCluster:
    import ray

    folder = session_folder()
    needs = Needs(object_store_bytes=object_store_bytes, ray="own")
    unwell = [finding for finding in examine(looks(needs, os.environ)) if finding.status != "ok"]
    os.environ.update(ray_environment(memory_bytes=psutil.virtual_memory().total))
    if metrics_port is not None:
        os.environ.update(METRICS_OPEN)
    os.environ.setdefault(*NO_SPARE_WORKERS)
    if any(finding.fatal and finding.subject == "shared memory" for finding in unwell):
        os.environ["RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"] = "1"
    reread_ray_environment()
    guard = Guard.of(str(folder))
    before = {child.pid for child in psutil.Process().children()}
    with (
        _released_on_error(guard),
        _start_failure_named(),
        _signal_handlers_kept(),
        _temporary_files_in(folder),
        _hangups_blocked(),
        without_idle_services(),
    ):
        context = ray.init(
            address="local",
            num_cpus=max(num_cpus, len(os.sched_getaffinity(0))),
            num_gpus=num_gpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(ray_folder(folder)),
            _metrics_export_port=metrics_port,
        )
    started = tuple(child.pid for child in psutil.Process().children() if child.pid not in before)
    warnings = tuple(f"this machine, {finding}" for finding in unwell)
    if metrics_port is not None:
        where = f"http://{context.address_info['node_ip_address']}:{metrics_port}/metrics"
        warnings += (f"report.prometheus_port: whoever reaches this machine can read the run's metrics at {where}",)
    return RayCluster(context.address_info["gcs_address"], True, started, folder, warnings, guard)


def session_folder() -> Path:
    """A new folder for one Ray node and what runs on it, which this user alone can enter (0700), below TMPDIR, or below
    /tmp where TMPDIR is too long for Ray's sockets, as that of a batch job often is."""
    name = "stillhouse-"
    below = tempfile.gettempdir()
    if len(str(ray_folder(Path(below, name)))) + 8 > MAX_TEMP_DIR:  # mkdtemp adds 8 characters
        below = "/tmp"
    return Path(tempfile.mkdtemp(prefix=name, dir=below))


def ray_folder(session: Path) -> Path:
    """Where Ray's sessions and logs lie in a session's folder. Ray opens what it is given to every user of the machine
    (0777), its sockets included: so it is given a folder inside the session's, which this user alone can enter."""
    return session / "r"


def _join_ray(address: str) -> RayCluster:
    import ray

    file = ray_token.named_token_file(os.environ)
    if file is not None:
        ray_token.refuse_open_token(file)
    reread_ray_environment()
    check_cluster(address)
    try:
        with _signal_handlers_kept():
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(f"cannot join the Ray cluster at {address}: {error}") from None
    warnings = () if ray_token.uses_token(os.environ) else (ray_token.WITHOUT_TOKEN,)
    return RayCluster(context.address_info["gcs_address"], False, (), None, warnings)


def stop_ray(cluster: RayCluster) -> None:
    """Disconnect; end and clean up what `start_ray` started, to the last process."""
    import ray

    family: list[psutil.Process] = []
    for pid in cluster.processes:
        if psutil.pid_exists(pid):
            process = psutil.Process(pid)
            family += [process, *process.children(recursive=True)]
    ray.shutdown()
    _, left = psutil.wait_procs(family, timeout=10)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=5)
    if cluster.guard is not None:
        cluster.guard.release()


@contextlib.contextmanager
def _released_on_error(guard: Guard) -> Iterator[None]:
    """Where Ray does not start, what it left is cleaned up at once and not when this process ends."""
    with contextlib.ExitStack() as undo:
        undo.callback(guard.release)
        yield
        undo.pop_all()


@contextlib.contextmanager
def _start_failure_named() -> Iterator[None]:
    """Ray raises bare exceptions of many types, most of all where the machine is too busy for its fixed 30 s."""
    try:
        yield
    except StillhouseError:  # the run was asked to stop meanwhile
        raise
    except Exception as error:
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        free = psutil.virtual_memory().available / 2**30
        raise InfrastructureError(
            f"Ray did not start on this machine (load {load:.1f} on {cores} cores, {free:.1f} GiB of memory free): "
            f"{error}"
        ) from error


@contextlib.contextmanager
def _temporary_files_in(session: Path) -> Iterator[None]:
    """What is started inside, and what that starts, keeps its temporary files in the session's folder: they go with it,
    however it ends. Compiled kernels, which would lie there too, are worth keeping."""
    (session / "tmp").mkdir()
    kernels = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(cache_folder() / "inductor")
    before = os.environ.get("TMPDIR")
    os.environ.update({"TMPDIR": str(session / "tmp"), "TORCHINDUCTOR_CACHE_DIR": kernels})
    try:
        yield
    finally:
        os.environ.pop("TMPDIR")
        os.environ |= {} if before is None else {"TMPDIR": before}


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """`ray.init` replaces the handler of SIGTERM: the run's own, which saves a checkpoint first, is put back."""
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:  # it came while Ray's own handler was in place, which says no more than this
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _hangups_blocked() -> Iterator[None]:
    """What is started inside never hears that the terminal was closed: the run decides what becomes of it. As with
    SIGINT, which Ray blocks by itself. Here the signal waits for the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",  # Ray listens on every interface: without a token any neighbour runs code
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15 any other work on the machine starves the run until it looks hung
}
"""What the processes of every Ray cluster start with, those that launch scripts make included."""

METRICS_CLOSED = {
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",  # no port: the two servers have no switch, note that they cannot listen and go on
    "DASHBOARD_METRIC_PORT": "-1",
}
"""Of clusters that Stillhouse starts by itself: Ray serves metrics on three ports of every interface, and asks nobody
for a token. Kubernetes has its own rules for them."""


METRICS_OPEN = {"RAY_enable_metrics_collection": "1"}
"""Of one whose metrics are wanted: at the one port that was asked for."""


def ray_environment(*, memory_bytes: int) -> dict[str, str]:
    """What Ray's own processes start with: set in this process before Ray is started. Never overrides the user's.

    Raises `ConfigError` for a token file that others may read.
    """
    values = RAY_SETTINGS | METRICS_CLOSED
    if memory_bytes < SMALL_MACHINE_BYTES:
        values["RAY_memory_monitor_refresh_ms"] = "0"  # it kills actors at 95 % of the memory, page cache included
    values = {name: value for name, value in values.items() if name not in os.environ}
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if {**values, **os.environ}["RAY_AUTH_MODE"] == "token" and not named:
        values[ray_token.TOKEN_PATH] = str(ray_token.own_token_file(cache_folder()))
    file = ray_token.named_token_file({**values, **os.environ})
    if file is not None:
        ray_token.refuse_open_token(file)
    return values


def reread_ray_environment() -> None:
    """Ray reads its variables once, when it is imported, which may long be past when they are set."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def object_store_bytes(max_label_bytes: int, *, weight_bytes: int = 0) -> int:
    """Of a Ray started for one run on this machine: labels are taken out of it as they are staged. `weight_bytes`: of
    the student's weights, where engines take them in: those of a version stay until the next one comes."""
    return min(max_label_bytes // 2 + 256 * 2**20, 2**30) + weight_bytes
