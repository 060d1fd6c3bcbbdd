"""The machine this process runs on: processor, GPUs, limits, disk, shared memory, ports, token, name.

Nothing here creates a CUDA context, starts a process or writes a file that stays.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from cluster.lifecycle import ray_token
from cluster.placement.hardware import Node, local_node
from cluster.preflight.finding import Finding, Look, ok, problem, warning
from cluster.preflight.software import torch_cuda
from cluster.runtime import cache_folder
from trainer.errors import ConfigError

OPEN_FILES = 65_536  # what Ray recommends; a connection and a worker's pipe take one each
FEW_OPEN_FILES = 4_096
GIB = 2**30
LITTLE_DISK_BYTES = 10 * GIB
NO_DISK_BYTES = GIB
RAY_PORTS = {6379: "ray start --head", 8265: "Ray's dashboard and job API", 10001: "Ray's client server"}
WORKER_PORTS = (10_002, 19_999)
FEW_PORTS = 1_000


@dataclass(frozen=True, slots=True)
class Needs:
    """What is asked of a machine, as plain values: a node is sent them. None where nothing is known or asked."""

    vllm: bool = True
    extras: tuple[str, ...] = ()  # of ours, for the process of the run's controller
    models: tuple[tuple[str, str | None], ...] = ()  # path and revision
    run_folder: str | None = None  # absolute
    shared: tuple[str, str] | None = None  # a folder that every node should see, and its mark
    disk_bytes: int | None = None  # what the run will write
    object_store_bytes: int | None = None  # of Ray here
    several_nodes: bool = False
    ray: Literal["by_hand", "own", "running"] = "running"
    """Who starts Ray here: somebody, with `ray start`, so its ports and its token matter; a run; it is there."""


def looks(needs: Needs, environment: Mapping[str, str]) -> list[Look]:
    """All of this file."""
    folder, store = needs.run_folder, needs.object_store_bytes
    of_folder = [Look("run folder", lambda: disk("run folder", Path(folder), needs.disk_bytes))] if folder else []
    of_ray = [Look("ports", ports), Look("token", lambda: token(environment)), Look("dashboard", dashboard)]
    return [
        Look("processor", processor),
        Look("accelerators", accelerators),
        Look("open files", open_files),
        *of_folder,
        Look("cache", lambda: disk("cache", cache_folder())),
        Look("shared memory", lambda: shared_memory(store, in_use=needs.ray == "running")),
        Look("host name", lambda: host_name(several_nodes=needs.several_nodes)),
        *(of_ray if needs.ray == "by_hand" else []),
    ]


def processor(node: Node | None = None) -> Finding:
    """bfloat16 is fast on GPUs and on processors with amx_bf16."""
    node = node or local_node()
    memory = f"{node.num_cpus} cores, {node.memory_bytes / GIB:.0f} GiB"
    if node.cpu_has_amx_bf16:
        return ok("processor", f"{memory}, amx_bf16: roles on it use bfloat16")
    return ok("processor", f"{memory}, no amx_bf16: roles on it use float32")


def accelerators(
    node: Node | None = None,
    built_for: Callable[[], str | None] = torch_cuda,
    driver: Callable[[], tuple[str, str] | None] | None = None,
) -> Finding:
    """Devices, driver and the build of torch, against each other. `driver`: (its version, the CUDA it supports)."""
    node = node or local_node()
    found, cuda = (driver or nvidia_driver)(), built_for()
    if not node.gpus and found is None:
        return ok("accelerators", "no GPU: every role runs on the processor")
    if not node.gpus:
        text = f"NVIDIA driver {found[0]} is loaded, but this process may open no GPU"
        return warning("accelerators", text, "in a container --gpus all; or look at CUDA_VISIBLE_DEVICES")
    name = f"{len(node.gpus)}x {node.gpus[0]}"
    if found is None:
        advice = "install the driver: nvidia-smi says more"
        return problem("accelerators", f"{name}, and no NVIDIA driver answers", advice)
    if cuda is None:
        advice = "pip install torch for CUDA, and 'stillhouse[gpu]' in place of [cpu]"
        return problem("accelerators", f"{name}, and torch is a build for hosts", advice)
    if int(cuda.split(".")[0]) > int(found[1].split(".")[0]):
        text = f"{name}: driver {found[0]} supports CUDA {found[1]}, torch was built for {cuda}"
        return problem("accelerators", text, "update the driver, or install torch for an older CUDA")
    return ok("accelerators", f"{name}, driver {found[0]} (CUDA {found[1]}), torch for CUDA {cuda}")


def nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> tuple[str, str] | None:
    """Version of the kernel's driver, and the newest CUDA that the driver's library supports; None without either."""
    try:
        match = re.search(r"Kernel Module\D*([\d.]+)", file.read_text())
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if match is None or library.cuDriverGetVersion(ctypes.byref(number)) != 0:  # makes no context, opens no device
        return None
    return match[1], f"{number.value // 1000}.{number.value % 1000 // 10}"


def open_files(limits: tuple[int, int] | None = None) -> Finding:
    soft, _ = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"ulimit -n {OPEN_FILES} before ray start, or LimitNOFILE= of the service"
    if soft < 1024:
        return problem("open files", f"at most {soft} a process", advice)
    if soft < FEW_OPEN_FILES:
        return warning("open files", f"at most {soft} a process: few for Ray on many nodes", advice)
    return ok("open files", f"at most {soft} a process")


def disk(subject: str, folder: Path, needed_bytes: int | None = None, need: str = "") -> Finding:
    """Whether files can be made there, and whether enough is free for `needed_bytes`, which `need` says in words."""
    found = writable(subject, folder)
    if found.fatal:
        return found
    free = shutil.disk_usage(existing(folder)).free
    text = f"{folder}: {size_text(free)} free"
    if needed_bytes is not None:
        text += f", the run needs {need or f'up to {size_text(needed_bytes)}'}"
        advice = "free some, name another folder, or lower training.keep_checkpoints"
        return problem(subject, text, advice) if free < needed_bytes else ok(subject, text)
    advice = "free some, or name a folder on another disk"
    if free < NO_DISK_BYTES:
        return problem(subject, text, advice)
    if free < LITTLE_DISK_BYTES:
        return warning(subject, f"{text}: little for checkpoints", advice)
    return ok(subject, text)


def writable(subject: str, folder: Path) -> Finding:
    """Whether the folder can be written or made. Makes nothing: a refused run leaves no trace."""
    place = existing(folder)
    if not place.is_dir():
        return problem(subject, f"{place} is a file, so {folder} cannot be a folder", "name another folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return problem(subject, f"cannot write in {place}: {error.strerror or error}", "name another folder")
    return ok(subject, str(folder))


def existing(folder: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    absolute = folder.absolute()
    return next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))


def size_text(num_bytes: int) -> str:
    """`1.5 GB`, `12 MB`, `478 kB`."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e6 or not num_bytes else f"{num_bytes / 1e3:.0f} kB"


def shared_memory(store_bytes: int | None, folder: Path = Path("/dev/shm"), *, in_use: bool = False) -> Finding:
    """Ray's object store lies in shared memory. `in_use`: by a store that runs already, so that what is free says
    nothing."""
    if not folder.is_dir():
        return problem("shared memory", f"there is no {folder}", "mount it: in a container --shm-size=8g")
    usage = shutil.disk_usage(folder)
    there, size = (usage.total, "") if in_use else (usage.free, " free")
    text = f"{folder} has {there / GIB:.1f} GiB{size}"
    advice = "in a container --shm-size, in Kubernetes an emptyDir with medium: Memory at /dev/shm"
    if store_bytes is None:
        little = warning("shared memory", f"{text}: little for labels", advice)
        return little if there < GIB else ok("shared memory", text)
    text += f", Ray's object store {store_bytes / GIB:.1f} GiB"
    if there < store_bytes:
        return problem("shared memory", f"{text}: labels travel through the disk, which is slow", advice)
    return ok("shared memory", text)


def host_name(
    *, several_nodes: bool, name: str | None = None, resolve: Callable[[str], str] = socket.gethostbyname
) -> Finding:
    """gloo asks what the host's own name resolves to, and offers that address to its peers."""
    name = name or socket.gethostname()
    advice = f"write the address of this machine before {name} in /etc/hosts, in place of 127.*"
    try:
        address = resolve(name)
    except OSError as error:
        return warning("host name", f"{name} does not resolve ({error})", advice)
    if not address.startswith("127."):
        return ok("host name", f"{name} is {address}")
    if not several_nodes:
        return ok("host name", f"{name} is {address}, which is enough for one machine and not for several")
    text = f"{name} is {address}: other nodes cannot reach that. Stillhouse names the interface itself, others hang"
    return warning("host name", text, advice)


def ports(listening: set[tuple[str, int]] | None = None) -> Finding:
    """Those that `ray start --head` wants, and whether enough others are free."""
    taken = {port for _, port in (listening_ports() if listening is None else listening)}
    busy = [f"{port} ({what})" for port, what in RAY_PORTS.items() if port in taken]
    first, last = WORKER_PORTS
    free = sum(port not in taken for port in range(first, last + 1))
    if free < FEW_PORTS:
        advice = "ray start --min-worker-port --max-worker-port"
        return problem("ports", f"{free} of {first} to {last} are free", advice)
    if busy:
        advice = "a Ray cluster that runs here already? ray status; or ray start --port and --dashboard-port"
        return warning("ports", f"taken: {', '.join(busy)}", advice)
    return ok("ports", f"{', '.join(map(str, RAY_PORTS))} and {free} of {first} to {last} are free")


def token(environment: Mapping[str, str]) -> Finding:
    """How Ray is started and joined from here: `train` and `submit --to local` turn tokens on, `ray start` does not."""
    mode = environment.get(ray_token.MODE)
    path, own = ray_token.named_token_file(environment), cache_folder() / ray_token.OWN_FILE
    for file in (path, own if own.exists() else None):
        try:
            if file is not None:
                ray_token.refuse_open_token(file)
        except ConfigError as error:
            text, _, advice = str(error).partition(": ")
            return problem("token", text, advice)
    if path is not None:
        return ok("token", f"in {path}, readable by nobody else")
    if ray_token.uses_token(environment):
        return ok("token", f"in the environment ({ray_token.TOKEN})")
    if mode is not None:
        text = f"{ray_token.MODE}={mode}: whoever reaches Ray's ports runs code as you"
        return warning("token", text, f"unset {ray_token.MODE}, or set it to token")
    return ok("token", f"{ray_token.MODE} is not set: runs on this machine make a token of their own")


def dashboard(listening: set[tuple[str, int]] | None = None) -> Finding:
    """Who reaches the dashboard's port submits jobs, which is running code."""
    known = listening_ports() if listening is None else listening
    hosts = sorted(host for host, port in known if port == 8265)
    exposed = [host for host in hosts if not host.startswith("127.") and host != "::1"]
    if exposed:
        advice = "ray start --dashboard-host 127.0.0.1 and an ssh tunnel; else a token and a firewall"
        return warning("dashboard", f"port 8265 listens on {', '.join(exposed)}", advice)
    return ok("dashboard", "listens on loopback only" if hosts else "none runs here")


def listening_ports() -> set[tuple[str, int]]:
    """(address, port) of every TCP socket that listens on this machine."""
    sockets = psutil.net_connections(kind="tcp")
    return {(entry.laddr.ip, entry.laddr.port) for entry in sockets if entry.status == psutil.CONN_LISTEN}
