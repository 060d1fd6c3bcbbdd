"""Machines as a text: `8xH100,8xA100`."""

from __future__ import annotations

import re

from cluster.placement.hardware import Hardware, Node

PARTS = (r"(?P<gpus>\d+)x(?P<gpu>[A-Za-z].*)", r"(?P<cpus>\d+)cpu(?P<amx>\+amx)?", r"(?P<memory>\d+)GiB")


def machines(text: str) -> Hardware:
    """Nodes separated by commas, each `8xH100`, `2cpu`, `2cpu+amx`, `8xH100/96cpu` or `8xH100/96cpu/2048GiB`.

    Where not said: 12 cores and 256 GiB a GPU, 8 GiB a core without one.
    """
    return Hardware(tuple(_node(part.strip(), index) for index, part in enumerate(text.split(","))))


def _node(text: str, index: int) -> Node:
    found: dict[str, str] = {}
    for part in text.split("/"):
        (match,) = (match for pattern in PARTS if (match := re.fullmatch(pattern, part)))
        found |= {key: value for key, value in match.groupdict().items() if value}
    num_gpus = int(found.get("gpus", 0))
    num_cpus = int(found.get("cpus", 12 * num_gpus))
    memory = int(found.get("memory", 256 * num_gpus or 8 * num_cpus))
    return Node(f"node-{index}", num_cpus, (found.get("gpu", ""),) * num_gpus, memory * 2**30, "amx" in found)
