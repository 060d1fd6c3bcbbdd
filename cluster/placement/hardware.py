"""What machines a run may use, as plain values: read from this host, or from a Ray cluster.

Nothing here creates a CUDA context.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.errors import InfrastructureError

KIND_PREFIX = "accelerator_type:"
"""Of Ray's resources that name a kind of GPU."""

GPUS_WITHOUT_BFLOAT16 = frozenset({"K80", "P4", "P40", "P100", "V100", "T4"})
"""Ray's names of data-centre GPUs older than Ampere."""

PROBE_TIMEOUT_S = 60.0

_GIB = 2**30

GPU_MEMORY_GIB = {
    **{"K80": 11.2, "P4": 7.6, "P40": 22.5, "P100": 15.9, "V100": 31.7, "T4": 14.6},
    **{
        "A10": 22.0,
        "A10G": 22.0,
        "A16": 14.6,
        "A30": 23.6,
        "A40": 44.4,
        "A100": 79.1,
        "A100-40G": 39.4,
        "A100-80G": 79.1,
    },
    **{"L4": 22.0, "L40": 44.4, "L40S": 44.4, "H20": 95.0, "H100": 79.1, "H200": 139.8, "B200": 178.3, "B300": 268.0},
    **{"3090": 23.6, "4090": 23.5, "5090": 31.4},
}
"""By the name of a kind, as Ray and `_short_name` have it: what its driver reports in all, without ECC. Where a name
stands for several sizes, the largest, so that nothing is refused that might fit."""

_KEPT_BY_THE_USER = 0.985
"""Of the size that a name says, such as 80GB; the driver has the rest."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine."""

    name: str
    num_cpus: int  # cores that exist
    gpus: tuple[str, ...] = ()  # name of each
    memory_bytes: int = 16 * _GIB
    cpu_has_amx_bf16: bool = False
    num_slots: int | None = None  # CPUs that a running Ray cluster hands out here; None: as many as the roles need
    num_free_gpus: int | None = None  # not used by anybody now; None: all
    num_free_slots: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)  # of Ray, those it gives itself (ray.io/...) included
    accelerator_types: tuple[str, ...] = ()  # further names under which Ray knows its accelerators
    host: str = ""  # for people, where `name` is an id
    gpu_memory_bytes: int | None = None  # of each GPU, where the driver said it

    @property
    def free_gpus(self) -> int:
        return len(self.gpus) if self.num_free_gpus is None else self.num_free_gpus

    @property
    def free_slots(self) -> int:
        """0 where nobody hands out slots."""
        return (self.num_slots or 0) if self.num_free_slots is None else self.num_free_slots


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machines of a run."""

    nodes: tuple[Node, ...]

    @property
    def num_gpus(self) -> int:
        return sum(len(node.gpus) for node in self.nodes)

    @property
    def num_cpus(self) -> int:
        return sum(node.num_cpus for node in self.nodes)

    @property
    def gpu_kinds(self) -> tuple[str, ...]:
        """Different GPU names, in the order in which nodes have them."""
        return tuple(dict.fromkeys(gpu for node in self.nodes for gpu in node.gpus))

    def describe(self) -> str:
        """One line for people: `2 nodes: 8xH100, 64 cores; 8xA100, 64 cores`."""
        texts = []
        for node in self.nodes:
            kinds = {gpu: node.gpus.count(gpu) for gpu in node.gpus}
            gpus = ", ".join(f"{count}x{gpu}" for gpu, count in kinds.items()) or "no GPU"
            texts.append(f"{gpus}, {node.num_cpus} cores")
        return f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''}: " + "; ".join(texts)

    @classmethod
    def local(cls) -> Hardware:
        """This host alone, as a Ray cluster started here would have it."""
        return cls((local_node(),))

    @classmethod
    def of_ray(cls) -> Hardware:
        """The nodes of the Ray cluster this process is connected to; each is asked for its cores, memory and flags."""
        import ray
        from ray._private.state import available_resources_per_node

        alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"])
        facts = _probe([node["NodeID"] for node in alive])
        free = available_resources_per_node()
        nodes = []
        for node, host in zip(alive, facts, strict=True):
            resources = node["Resources"]
            num_gpus = int(resources.get("GPU", 0))
            kinds = [key.removeprefix(KIND_PREFIX) for key in resources if key.startswith(KIND_PREFIX)]
            available = free.get(node["NodeID"], {})
            nodes.append(
                Node(
                    name=node["NodeID"],
                    num_cpus=host.num_cpus,
                    gpus=((*kinds, "GPU")[0],) * num_gpus,
                    memory_bytes=host.memory_bytes,
                    gpu_memory_bytes=host.gpu_memory_bytes,
                    cpu_has_amx_bf16=host.cpu_has_amx_bf16,
                    num_slots=int(resources.get("CPU", 0)),
                    num_free_gpus=int(available.get("GPU", 0)),
                    num_free_slots=int(available.get("CPU", 0)),
                    labels=dict(node.get("Labels", {})),
                    accelerator_types=tuple(kinds),
                    host=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
                )
            )
        return cls(tuple(nodes))


def gpu_memory_bytes(kind: str) -> int | None:
    """Of a kind of GPU by its name, as Ray, Slurm or a cloud write it; None where it is not known."""
    words = re.split(r"[\s_-]+", kind.upper())
    sizes = [int(found[1]) for word in words if (found := re.fullmatch(r"(\d+)GB?", word))]
    known = [GPU_MEMORY_GIB[word] for word in words if word in GPU_MEMORY_GIB]
    if sizes:
        return int(min(sizes) * _KEPT_BY_THE_USER * _GIB)
    return int(known[0] * _GIB) if known else None


def gpu_has_bfloat16(name: str) -> bool:
    """By the name; an unknown one is taken for a current GPU."""
    old_geforce = re.search(r"GTX|RTX.?20\d\d", name, re.IGNORECASE)
    return not old_geforce and not GPUS_WITHOUT_BFLOAT16 & set(re.split(r"[\s-]+", name.upper()))


def local_node() -> Node:
    """This host; the limits of a container count."""
    flags = _read("/proc/cpuinfo")
    return Node(
        name=socket.gethostname(),
        num_cpus=_num_cores(),
        gpus=_local_gpus(),
        memory_bytes=_memory_bytes(),
        gpu_memory_bytes=_stated_gpu_memory(_gpu_models()),
        cpu_has_amx_bf16=" amx_bf16" in flags,
    )


def _probe(node_ids: Sequence[str]) -> list[Node]:
    """`local_node()` of every node of the cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if list(node_ids) == [ray.get_runtime_context().get_node_id()]:
        return [local_node()]
    ask = ray.remote(num_cpus=0, max_retries=0)(local_node)
    refs = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for node_id in node_ids
    ]
    try:
        return ray.get(refs, timeout=PROBE_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        raise InfrastructureError(f"a node of the Ray cluster cannot be asked what it has: {error}") from None


def _num_cores() -> int:
    """Cores this process may use: its affinity mask and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _local_gpus() -> tuple[str, ...]:
    """NVIDIA devices that this process may open, by the driver's files: no library, no context."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    count = len(devices) if visible is None else min(len(devices), len([item for item in visible.split(",") if item]))
    names = _gpu_models()
    kind = _short_name(names[0]) if names else "GPU"
    return (kind,) * count


def _gpu_models() -> list[str]:
    """As the driver calls them: `NVIDIA H100 80GB HBM3`."""
    return [
        match[1].strip()
        for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        if (match := re.search(r"^Model:\s*(.+)$", _read(str(file)), re.MULTILINE))
    ]


def _stated_gpu_memory(models: Sequence[str]) -> int | None:
    """Where the driver's names say the size."""
    sizes = [int(found[1]) for model in models if (found := re.search(r"\b(\d+) ?GB\b", model))]
    return int(min(sizes) * _KEPT_BY_THE_USER * _GIB) if sizes else None


def _short_name(model: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `H100`, as Ray names it: the first word with a digit, brands left out."""
    for word in model.split():
        if re.search(r"\d", word):
            return word.split("-")[0]
    return model


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
