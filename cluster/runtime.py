"""The one place with environment variables, ports and device rules; those of Ray itself are in `ray_session`.

Everything that differs between a CPU and a GPU process, or between a laptop and a cluster, is a row or a function here,
so that a reader can check in one sitting what a GPU role is told. No other file names a kind of GPU.
"""

from __future__ import annotations

import os
import socket
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from trainer.build import FAST, LOG_LEVEL

if TYPE_CHECKING:
    import torch

Role = Literal["student", "scorer", "generator", "rollout", "controller"]
Accelerator = Literal["cpu", "gpu"]

STUDENT: Role = "student"
SCORER: Role = "scorer"
GENERATOR: Role = "generator"
ROLLOUT: Role = "rollout"  # an engine that holds the student, and writes
CONTROLLER: Role = "controller"  # the run's own process, and helper actors that hold no accelerator
CPU: Accelerator = "cpu"
GPU: Accelerator = "gpu"

ENGINES = (SCORER, GENERATOR, ROLLOUT)
WORKERS = (STUDENT, *ENGINES)
ALL_ROLES = (*WORKERS, CONTROLLER)
BOTH = (CPU, GPU)


def actors_of(role: Role, teacher: str = "") -> str:
    """What the actors of a role are called together: `scorer`; in a run with teachers by name `code.scorer`."""
    return f"{teacher}.{role}" if teacher else role


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
    # back to the kernel, and come in huge pages. Clearing them is 10-20 % of a student's CPU time (docs/benchmarks.md).
    Setting("MALLOC_MMAP_THRESHOLD_", "16777216", (STUDENT,), (CPU,), "tensors below 16 MiB stay in the heap"),
    Setting("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", (STUDENT,), (CPU,), "huge pages where the kernel offers them"),
    Setting("MALLOC_ARENA_MAX", "1", WORKERS, (CPU,), "calls run in threads: their own arenas map what is over 64 MB"),
    # Activations are freed in the order in which backward undoes them, from the top of the heap down: a student gives
    # them back while its gradients grow, which takes one system call for 64 MiB.
    Setting("MALLOC_TRIM_THRESHOLD_", "67108864", (STUDENT,), (CPU,), "the heap shrinks by 64 MiB at a time"),
    Setting("MALLOC_TOP_PAD_", "33554432", (STUDENT,), (CPU,), "the heap grows by 32 MiB at a time"),
    Setting("MALLOC_TRIM_THRESHOLD_", "-1", ENGINES, (CPU,), "the heap never shrinks"),
    Setting("MALLOC_TOP_PAD_", "268435456", ENGINES, (CPU,), "the heap grows by 256 MiB at a time"),
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


LIBRARY_LEVELS = {
    "debug": {"VLLM_LOGGING_LEVEL": "DEBUG", "TRANSFORMERS_VERBOSITY": "info", "NCCL_DEBUG": "INFO"},
    "error": {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"},
}
"""By the log level of a run; what `environment` says holds for the others. `trainer/model/zero.py` tells DeepSpeed."""


def handed_on() -> dict[str, str]:
    """What this process was told about this project's own code, for all processes of its run, on other nodes too."""
    own = {name: os.environ[name] for name in (FAST, LOG_LEVEL) if name in os.environ}
    return own | LIBRARY_LEVELS.get(own.get(LOG_LEVEL, ""), {})


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


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank an actor is."""

    actor: int  # index of the actor, as it was started
    rank: int
    local_rank: int  # what LOCAL_RANK must say: among the GPUs the process *sees*, so 0 where Ray masked it to one
    local_size: int  # ranks on this node
    node: str


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


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", 0))
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
