"""The one place with environment variables, ports, the start of Ray and device rules.

Everything that differs between a CPU and a GPU process, or between a laptop and a cluster, is a row or a function here,
so that a reader can check in one sitting what a GPU role is told. No other file names a device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from cluster import ray_token
from cluster.guard import Guard
from cluster.joining import check_cluster
from trainer.errors import ConfigError, InfrastructureError

if TYPE_CHECKING:
    import torch

    from cluster.topology import RankPlace

Role = Literal["student", "scorer", "writer", "controller"]
Accelerator = Literal["cpu", "gpu"]

STUDENT: Role = "student"
SCORER: Role = "scorer"
WRITER: Role = "writer"
CONTROLLER: Role = "controller"  # the run's own process, and helper actors that hold no accelerator
CPU: Accelerator = "cpu"
GPU: Accelerator = "gpu"

ENGINES = (SCORER, WRITER)
WORKERS = (STUDENT, *ENGINES)
ALL_ROLES = (*WORKERS, CONTROLLER)
BOTH = (CPU, GPU)


@dataclass(frozen=True, slots=True)
class Setting:
    """One environment variable: for whom, and why."""

    name: str
    value: str
    roles: tuple[Role, ...]
    accelerators: tuple[Accelerator, ...]
    why: str


# fmt: off
SETTINGS: tuple[Setting, ...] = (
    # every process
    Setting("TOKENIZERS_PARALLELISM", "false", ALL_ROLES, BOTH, "text is tokenised once; forked pools warn"),
    Setting("PYTHONDONTWRITEBYTECODE", "", ALL_ROLES, BOTH, "at 1, as in many containers, each start compiles"),
    Setting("HF_HUB_DISABLE_TELEMETRY", "1", ALL_ROLES, BOTH, "a run tells nobody that it runs"),
    # host processes: one thread each is cheapest, spinning threads starve their neighbours
    Setting("OMP_WAIT_POLICY", "PASSIVE", ALL_ROLES, (CPU,), "idle OpenMP threads sleep instead of spinning"),
    Setting("CUDA_VISIBLE_DEVICES", "", ALL_ROLES, (CPU,), "on a machine with GPUs a host process must not see them"),
    Setting("CUDA_VISIBLE_DEVICES", "", (CONTROLLER,), (GPU,), "Ray shows every GPU to an actor that asked for none"),
    # glibc gives each large tensor back to the kernel: 30-45 % of a plain run went into page faults
    Setting("MALLOC_MMAP_MAX_", "0", ENGINES, (CPU,), "large tensors stay in the heap"),
    # A student's heap would be torn to pieces by logits and gradients of ever other sizes: twice the memory. Those go
    # back to the kernel, and come in huge pages, so that their page faults cost next to nothing.
    Setting("MALLOC_MMAP_THRESHOLD_", "16777216", (STUDENT,), (CPU,), "tensors below 16 MiB stay in the heap"),
    Setting("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", (STUDENT,), (CPU,), "huge pages where the kernel offers them"),
    Setting("MALLOC_ARENA_MAX", "1", WORKERS, (CPU,), "calls run in threads: their own arenas map what is over 64 MB"),
    Setting("MALLOC_TRIM_THRESHOLD_", "-1", WORKERS, (CPU,), "the heap never shrinks"),
    Setting("MALLOC_TOP_PAD_", "268435456", WORKERS, (CPU,), "the heap grows by 256 MiB at a time"),
    # students
    Setting("DS_ACCELERATOR", "cpu", (STUDENT,), (CPU,), "DeepSpeed would guess from installed packages"),
    Setting("DS_ACCELERATOR", "cuda", (STUDENT,), (GPU,), "DeepSpeed would guess from installed packages"),
    Setting("PYTORCH_ALLOC_CONF", "expandable_segments:True", (STUDENT,), (GPU,), "packed batches differ in length"),
    # engines
    Setting("VLLM_ENABLE_V1_MULTIPROCESSING", "0", ENGINES, BOTH, "the engine core lives in the actor itself"),
    Setting("VLLM_USE_V2_MODEL_RUNNER", "0", ENGINES, BOTH, "V2 pooling refuses model classes of ours"),
    Setting("VLLM_WORKER_MULTIPROC_METHOD", "spawn", ENGINES, BOTH, "an actor has threads and cannot be forked"),
    Setting("VLLM_NO_USAGE_STATS", "1", ENGINES, BOTH, "a run tells nobody that it runs"),
    Setting("VLLM_LOGGING_LEVEL", "WARNING", ENGINES, BOTH, "its log goes to the run folder"),
    Setting("VLLM_CPU_OMP_THREADS_BIND", "nobind", ENGINES, (CPU,), "auto pins every engine of a machine to core 0"),
    Setting("TORCHDYNAMO_DISABLE", "1", ENGINES, (CPU,), "a sharded embedding would call g++ at its first step"),
)
# fmt: on


def environment(
    role: Role,
    accelerator: Accelerator,
    *,
    threads: int | None = None,
    offline: bool = False,
    bytecode_folder: str | None = None,
) -> dict[str, str]:
    """The variables that a process of this role starts with, on top of what it inherits.

    `threads` is OMP_NUM_THREADS; None means 1 on hosts and, for GPU roles, what Ray gives. `offline` keeps Hugging Face
    libraries off the network, for models that are folders. `bytecode_folder`: see the function of that name.
    """
    rows = {s.name: s.value for s in SETTINGS if role in s.roles and accelerator in s.accelerators}
    if threads is None and accelerator == CPU:
        threads = 1
    if threads is not None:
        rows["OMP_NUM_THREADS"] = str(threads)
    if offline:
        rows["HF_HUB_OFFLINE"] = "1"
    if bytecode_folder is not None:
        rows["PYTHONPYCACHEPREFIX"] = bytecode_folder
    return dict(sorted(rows.items()))


def cache_folder() -> Path:
    """Where this user's caches lie: XDG_CACHE_HOME/stillhouse."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"


def bytecode_folder() -> str | None:
    """Where processes keep compiled Python files: None for beside the sources, wherever those can be written."""
    inherited = os.environ.get("PYTHONPYCACHEPREFIX")
    if inherited:
        return inherited
    writable = os.access(sysconfig.get_paths()["purelib"], os.W_OK)
    return None if writable else str(cache_folder() / "bytecode")


# --- the student's process group --------------------------------------------------------------------------------------


def student_environment(place: RankPlace, *, world: int, address: str, port: int) -> dict[str, str]:
    """What torch.distributed and DeepSpeed read. Called in the rank's own process, before either is imported.

    `address`, `port`: of rank 0. `place.local_rank` is already 0 where Ray shows the process one GPU only.
    """
    values = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_SIZE": str(place.local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    if place.local_size < world:
        values |= network_environment(STUDENT, towards=address)
    return values


# --- addresses of a node ----------------------------------------------------------------------------------------------

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""gloo asks what the host name resolves to, often a loopback address: the group then hangs for 75 s and fails."""

NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
"""NCCL takes the first interface that is up, which may lead nowhere."""

OWN_ADDRESS = "VLLM_HOST_IP"
"""vLLM takes the address of the route to the internet, and a cluster's nodes may have none."""

LOOPBACK = "lo"


def network_environment(role: Role, *, towards: str) -> dict[str, str]:
    """By which address and interface this process is reached: those of the route to `towards`, the address of the head
    or of rank 0. Called in the process itself, before its libraries are imported; what the user has set stays."""
    route = _route(towards)
    if route is None:
        return {}
    address, interface = route
    values = {OWN_ADDRESS: address} if role in ENGINES else {}
    if interface != LOOPBACK or role == STUDENT:
        values |= {GLOO_INTERFACE: interface, NCCL_INTERFACE: f"={interface}"}  # "=": no prefix of other names
    return {name: value for name, value in values.items() if name not in os.environ}


def set_network(role: Role) -> None:
    """Set `network_environment` in this process, an actor, by the route to the head of its cluster."""
    import ray

    head = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    os.environ.update(network_environment(role, towards=head.strip("[]")))


def _route(towards: str) -> tuple[str, str] | None:
    """This host's own address on the way to `towards`, and its interface; None where that cannot be told."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # a datagram socket: nothing is sent
        except OSError:
            return None
        own = probe.getsockname()[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family == family and entry.address.partition("%")[0] == own for entry in entries):
            return own, name
    return None


def free_port(preferred: int | None = None) -> int:
    """A TCP port that nobody listens on now. Raises `ConfigError` where the preferred one is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", preferred or 0))
        except OSError as error:
            raise ConfigError(
                f"port {preferred} cannot be used on {socket.gethostname()}: {error.strerror}. Name a free one, or none"
            ) from None
        return probe.getsockname()[1]


# --- devices ----------------------------------------------------------------------------------------------------------


def device_type_of(accelerator: Accelerator) -> str:
    """The type of torch.device behind an accelerator."""
    return "cuda" if accelerator == GPU else "cpu"


def backend_of(accelerator: Accelerator) -> str:
    """The backend of torch.distributed for an accelerator."""
    return "nccl" if accelerator == GPU else "gloo"


def device_of(device_type: str, local_rank: int = 0) -> torch.device:
    """The device of a process. `local_rank` counts the GPUs that the process can see: 0 where Ray masked it to one."""
    import torch

    return torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)


def enter_device(device: torch.device) -> None:
    """Make a GPU the current one of this *thread*: Ray may run each call of an actor in another."""
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)


# --- Ray --------------------------------------------------------------------------------------------------------------

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
    temp_dir: Path | None = None,
) -> RayCluster:
    """Join the cluster at `address` (or RAY_ADDRESS), or start one of this machine where neither is given.

    `num_cpus` is the number of slots that the roles need: a role is a logical slot, so a cluster started here has at
    least that many, cores or no cores. `num_gpus` None: Ray counts them. `temp_dir`: for Ray's sessions and logs, at
    most 43 characters; None makes one that `stop_ray` removes. "local" as address never joins anything.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        return _join_ray(address)
    import ray

    folder = temp_dir or _session_folder()
    made = None if temp_dir else folder
    if len(str(folder)) > MAX_TEMP_DIR:
        raise ConfigError(
            f"Ray's folder {folder} has {len(str(folder))} characters, its sockets allow {MAX_TEMP_DIR}: name a "
            "shorter path"
        )
    warning = shared_memory_warning(object_store_bytes)
    os.environ.update(ray_environment(memory_bytes=psutil.virtual_memory().total))
    if warning:
        os.environ["RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"] = "1"
    reread_ray_environment()
    guard = Guard.of(str(made)) if made is not None else None
    before = {child.pid for child in psutil.Process().children()}
    with _released_on_error(guard), _start_failure_named(), _signal_handlers_kept(), _temporary_files_in(made):
        context = ray.init(
            address="local",
            num_cpus=max(num_cpus, len(os.sched_getaffinity(0))),
            num_gpus=num_gpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
        )
    started = tuple(child.pid for child in psutil.Process().children() if child.pid not in before)
    warnings = (warning,) if warning else ()
    return RayCluster(context.address_info["gcs_address"], True, started, made, warnings, guard)


def _session_folder() -> Path:
    """A new folder below TMPDIR, or below /tmp where TMPDIR is too long for Ray's sockets, as that of a batch job often
    is; readable by this user alone."""
    name = "stillhouse-"
    below = tempfile.gettempdir()
    if len(f"{below}/{name}") + 8 > MAX_TEMP_DIR:  # mkdtemp adds 8 characters
        below = "/tmp"
    return Path(tempfile.mkdtemp(prefix=name, dir=below))


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
def _released_on_error(guard: Guard | None) -> Iterator[None]:
    """Where Ray does not start, what it left is cleaned up at once and not when this process ends."""
    with contextlib.ExitStack() as undo:
        if guard is not None:
            undo.callback(guard.release)
        yield
        undo.pop_all()


@contextlib.contextmanager
def _start_failure_named() -> Iterator[None]:
    """Ray raises bare exceptions of many types, most of all where the machine is too busy for its fixed 30 s."""
    try:
        yield
    except Exception as error:
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        free = psutil.virtual_memory().available / 2**30
        raise InfrastructureError(
            f"Ray did not start on this machine (load {load:.1f} on {cores} cores, {free:.1f} GiB of memory free): "
            f"{error}"
        ) from error


@contextlib.contextmanager
def _temporary_files_in(session: Path | None) -> Iterator[None]:
    """What is started inside, and what that starts, keeps its temporary files in the session's folder: they go with it,
    however it ends. Compiled kernels, which would lie there too, are worth keeping."""
    if session is None:
        yield
        return
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
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",  # Ray listens on every interface: without a token any neighbour runs code
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15 any other work on the machine starves the run until it looks hung
}
"""What the processes of every Ray cluster start with, those that launch scripts make included."""


def ray_environment(*, memory_bytes: int) -> dict[str, str]:
    """What Ray's own processes start with: set in this process before Ray is started. Never overrides the user's.

    Raises `ConfigError` for a token file that others may read.
    """
    values = dict(RAY_SETTINGS)
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


def object_store_bytes(max_label_bytes: int) -> int:
    """Of a Ray started for one run on this machine: labels are taken out of it as they are staged."""
    return min(max_label_bytes // 2 + 256 * 2**20, 2**30)


def shared_memory_warning(object_store_bytes: int | None, shared_memory: Path = Path("/dev/shm")) -> str | None:
    """Where the labels would travel through a disk instead of shared memory."""
    if object_store_bytes is None or not shared_memory.is_dir():
        return None
    free = psutil.disk_usage(str(shared_memory)).free
    if free >= object_store_bytes:
        return None
    return (
        f"{shared_memory} has {free / 2**20:.0f} MiB free, the object store wants {object_store_bytes / 2**20:.0f}: "
        "labels travel through the disk, which is slow. In a container, start it with --shm-size"
    )
