"""What a run needs beside what is offered: whether it fits, and which settings would need less. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.placement.choices import DtypeRule
from cluster.placement.hardware import Hardware, gpu_has_bfloat16, gpu_memory_bytes
from cluster.placement.memory.needs import KnownSizes, memory_needs
from cluster.placement.memory.parts import MARGIN, RoleMemory, certain, total
from cluster.runtime import CPU, GPU, STUDENT
from configs.engines import Vllm
from configs.models import LoRA
from configs.schema import Run

Fit = Literal["fits", "close", "over", "cannot"]
"""close: only if the estimate is not too low. over: not by the estimate. cannot: its certain parts alone are more."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a run may use, as far as it is known."""

    where: str  # for people: `this machine`
    gpus: tuple[str, ...] = ()  # kind of each
    gpu_bytes: int | None = None  # of the largest: where kinds differ, which role gets which is decided later
    host_bytes: int | None = None  # of all machines together, swap included
    fast_bfloat16: bool = False  # of the processors
    machines: int = 1
    is_here: bool = False  # the machine that looks; where a run is sent it is only used there

    @classmethod
    def of(cls, hardware: Hardware, where: str, *, swap_bytes: int = 0) -> Offer:
        kinds = tuple(kind for node in hardware.nodes for kind in node.gpus)
        sizes = [node.gpu_memory_bytes or gpu_memory_bytes(kind) for node in hardware.nodes for kind in node.gpus]
        return cls(
            where,
            gpus=kinds,
            gpu_bytes=None if None in sizes else max(sizes, default=None),
            host_bytes=sum(node.memory_bytes for node in hardware.nodes) + swap_bytes,
            fast_bfloat16=all(node.cpu_has_amx_bf16 for node in hardware.nodes),
            machines=len(hardware.nodes),
        )

    def rule(self, run: Run) -> DtypeRule:
        """Accelerator and dtypes of a run there. Where it asks for GPUs, those, whether there are any or not."""
        if run.accelerator == CPU or (run.accelerator == "auto" and not self.gpus):
            return DtypeRule(CPU, self.fast_bfloat16, f"this CPU has {'' if self.fast_bfloat16 else 'no '}amx_bf16")
        old = [kind for kind in self.gpus if not gpu_has_bfloat16(kind)]
        return DtypeRule(GPU, not old, f"{', '.join(dict.fromkeys(old or self.gpus))} has no bfloat16")


def fit(needed: int, sure: int, offered: int) -> Fit:
    if sure > offered:
        return "cannot"
    if needed > offered:
        return "over"
    return "close" if needed * (1 + MARGIN) > offered else "fits"


def device_fit(role: RoleMemory, offered: int) -> Fit:
    """Of each device of a role, as far as the role may use it."""
    return fit(role.device_bytes, certain(role.device), int(offered * role.share))


def host_fit(roles: Sequence[RoleMemory], offered: int, *, machines: int = 1) -> Fit:
    """Of all processes together."""
    return fit(host_bytes(roles, machines=machines), sure_host_bytes(roles, machines=machines), offered)


def host_bytes(roles: Sequence[RoleMemory], *, machines: int = 1) -> int:
    """Of all processes, where they lie on so many machines."""
    return sum(role.host_bytes * role.processes + total(role.shared) * min(machines, role.processes) for role in roles)


def sure_host_bytes(roles: Sequence[RoleMemory], *, machines: int = 1) -> int:
    """What of it is counted exactly."""
    found = ((certain(role.host) * role.processes, certain(role.shared), role.processes) for role in roles)
    return sum(own + shared * min(machines, processes) for own, shared, processes in found)


def num_devices(roles: Sequence[RoleMemory]) -> int:
    return sum(role.processes for role in roles if role.device)


def savings(run: Run, known: KnownSizes, rule: DtypeRule, role: str | None) -> Iterator[tuple[str, int]]:
    """(settings to write, what the role's device then needs; of all processes where `role` is None), of each change
    that saves, then of all of them together."""
    before, together, texts = _needed(run, known, rule, role), run, []
    for name, value in _candidates(run, role, on_gpu=rule.accelerator == GPU):
        changed = _with(run, name, value)
        needed = _needed(changed, known, rule, role)
        if needed < 0.98 * before:
            yield f"{name}: {_yaml(value)}", needed
            texts.append(f"{name}: {_yaml(value)}")
            together = _with(together, name, value)
    if len(texts) > 1:
        yield f"{', '.join(texts[:-1])} and {texts[-1]} together", _needed(together, known, rule, role)


def _needed(run: Run, known: KnownSizes, rule: DtypeRule, role: str | None) -> int:
    roles = memory_needs(run, known, rule)
    if role is None:
        return host_bytes(roles)
    return next(one.device_bytes for one in roles if one.role == role)


def _candidates(run: Run, role: str | None, *, on_gpu: bool) -> Iterator[tuple[str, Any]]:
    """Settings in the order in which they cost least."""
    if role in (STUDENT, None):
        yield from _of_student(run, on_gpu=on_gpu)
    for name, teacher in run.named_teachers().items():
        place = "teacher" if run.teacher is not None else f"teachers.{name}"
        for kind, replicas in teacher.roles().items():
            if on_gpu and role is not None and role.endswith(kind):
                yield from ((f"{place}.{kind}.tensor_parallel_size", replicas.tensor_parallel_size * n) for n in (2, 4))
            cache_is_given = isinstance(replicas.engine, Vllm) and replicas.engine.kv_cache_bytes is not None
            if cache_is_given and (role is None or role.endswith(kind)):
                yield f"{place}.{kind}.engine.kv_cache_bytes", None
            if role is None and replicas.replicas > 1:
                yield f"{place}.{kind}.replicas", 1


def _of_student(run: Run, *, on_gpu: bool) -> Iterator[tuple[str, Any]]:
    student = run.student
    if run.training.micro_batch_tokens > run.data.max_length:
        yield "training.micro_batch_tokens", run.data.max_length
    if student.loss_chunk_rows > 128:
        yield "student.loss_chunk_rows", 128
    if not student.activation_checkpointing:
        yield "student.activation_checkpointing", True
    if student.zero_stage != 3 and student.ranks > 1:
        yield "student.zero_stage", 3
    if on_gpu:
        yield "student.ranks", student.ranks * 2
        if student.offload == "none":
            yield "student.offload", "optimizer"
    elif student.ranks > 1:
        yield "student.ranks", 1
    if student.lora is None:
        yield "student.lora", {"rank": 16}


def _with(run: Run, name: str, value: Any) -> Run:
    """The run with one setting; not validated, since it is only measured."""
    return _changed(run, name.split("."), LoRA(**value) if name == "student.lora" else value)


def _changed(holder: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    if isinstance(holder, dict):
        return {**holder, path[0]: _changed(holder[path[0]], path[1:], value)}
    return holder.model_copy(update={path[0]: _changed(getattr(holder, path[0]), path[1:], value)})


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
