"""Whether the pods of `--to kuberay` have the capacity for the roles of a run, asked of the run's own placement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.placement.groups import RoleRequest
from cluster.placement.hardware import Hardware, Node
from cluster.placement.roles import roles_of
from cluster.placement.topology import place
from cluster.runtime import CPU, GPU, STUDENT
from configs.schema import Run
from launch.targets.kuberay_manifests import Group, Options
from trainer.errors import ConfigError


def check_capacity(run: Run, options: Options) -> None:
    """Raises `ConfigError` where the pods of a group are too few or too small for its roles, with options that suffice.
    On pods without GPUs a process takes a CPU; on those with GPUs it takes a GPU and a CPU."""
    for name, group in (("teachers", options.teachers), ("students", options.students)):
        anywhere = {"accelerator_type": None, "node_labels": {}}  # labels are given to the pods elsewhere
        requests = [
            replace(request, constraints=request.constraints.model_copy(update=anywhere))
            for request in roles_of(run, GPU if group.gpus else CPU)
            if (request.role == STUDENT) == (name == "students")
        ]
        if not _fit(requests, group):
            raise ConfigError(_refusal(name, group, requests))


def _refusal(name: str, group: Group, requests: Sequence[RoleRequest]) -> str:
    needed = sum(request.count * request.shards for request in requests)
    largest = max(request.shards for request in requests)
    noun, each = ("GPUs", f"{group.gpus} GPUs and {group.cpus} CPUs") if group.gpus else ("CPUs", f"{group.cpus} CPUs")
    parts = f" in parts of {largest} on one machine" if largest > 1 else ""
    text = f"the {name} of this run need {needed} {noun}{parts}, and the group has {group.replicas} x {each}: write "
    for change in _changes(group, requests, needed):
        if _fit(requests, group.model_copy(update=change)):
            new = {option: value for option, value in change.items() if value != getattr(group, option)}
            words = " ".join(f"--with {name}.{option}={value}" for option, value in new.items())
            smaller = ", a smaller tensor_parallel_size" if largest > 1 else ""
            return f"{text}{words}{smaller}, or lower replicas or ranks of the run"
    return f"{text}another placement: no number or size of pods fits this one"


def _changes(group: Group, requests: Sequence[RoleRequest], needed: int) -> Iterator[dict[str, int]]:
    """Candidates, smallest change first: more CPUs beside the GPUs, more pods, larger pods."""
    if group.gpus:
        yield from ({"cpus": cpus} for cpus in range(group.cpus + 1, needed + 1))
    most = max(needed, *(request.constraints.nodes or 1 for request in requests))
    yield from ({"replicas": pods} for pods in range(group.replicas + 1, most + 1))
    kind = "gpus" if group.gpus else "cpus"
    for size in range(getattr(group, kind) + 1, needed + 1):
        for pods in range(group.replicas, most + 1):
            yield {kind: size, "replicas": pods}
            yield {kind: size, "replicas": pods, "cpus": max(size, group.cpus)}


def _fit(requests: Sequence[RoleRequest], group: Group) -> bool:
    pod = Node("pod", num_cpus=group.cpus, num_slots=group.cpus, gpus=("GPU",) * group.gpus)
    pods = tuple(replace(pod, name=f"pod-{number}") for number in range(group.replicas))
    try:
        place(requests, Hardware(pods))
    except ConfigError:
        return False
    return True
