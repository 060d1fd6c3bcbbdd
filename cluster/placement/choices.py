"""What the machines decide for all roles of a run alike: accelerator, dtypes, threads and environments."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.placement.facts import RunFacts
from cluster.placement.groups import Placement
from cluster.placement.hardware import Hardware, gpu_has_bfloat16
from cluster.runtime import CPU, GPU, STUDENT, Accelerator, Role, environment
from configs.schema import Run
from trainer.errors import ConfigError

MAX_THREADS = 8
"""More threads of one process gain little; more ranks or replicas use the cores."""


@dataclass(frozen=True, slots=True)
class DtypeRule:
    """dtype by capability, and why."""

    accelerator: Accelerator
    fast_bfloat16: bool
    why: str

    @classmethod
    def of(cls, hardware: Hardware, accelerator: Accelerator) -> DtypeRule:
        if accelerator == GPU:
            old = [kind for kind in hardware.gpu_kinds if not gpu_has_bfloat16(kind)]
            why = f"{', '.join(old)} has no bfloat16" if old else ", ".join(hardware.gpu_kinds)
            return cls(accelerator, not old, why)
        fast = all(node.cpu_has_amx_bf16 for node in hardware.nodes)
        return cls(accelerator, fast, f"this CPU has {'' if fast else 'no '}amx_bf16")

    def choose(self, role: str, wanted: str) -> str:
        """Raises `ConfigError` where the GPUs do not have what is wanted."""
        if wanted == "auto":
            return "bfloat16" if self.fast_bfloat16 else "float32"
        if wanted == "bfloat16" and not self.fast_bfloat16 and self.accelerator == GPU:
            raise ConfigError(f"{role}: dtype: bfloat16, and {self.why}. Write dtype: auto or float32")
        return wanted

    def reason(self, role: str, wanted: str) -> str | None:
        """Why a dtype was chosen; None where it is as configured."""
        return f"{role}: {self.choose(role, wanted)} ({self.why})" if wanted == "auto" else None

    def warning(self, role: str, wanted: str) -> str | None:
        if wanted == "bfloat16" and not self.fast_bfloat16:
            return f"{role}: bfloat16, and {self.why}: several times slower than float32 here"
        return None


@dataclass(frozen=True, slots=True)
class Choices:
    """What the plans of all roles have in common."""

    run: Run
    facts: RunFacts
    hardware: Hardware
    accelerator: Accelerator
    placement: Placement
    dtypes: DtypeRule

    def environment(self, role: Role) -> dict[str, str]:
        """Of every process of a role."""
        return environment(
            role,
            self.accelerator,
            threads=self._threads(role),
            offline=self.facts.offline,
            bytecode_folder=self.facts.bytecode_folder,
        )

    def _threads(self, role: Role) -> int | None:
        """OpenMP threads of a process. None: as Ray gives, on GPUs, but for a student whose optimizer runs on the host,
        on every core there is.

        On hosts the cores are divided among all processes, since threads that wait for a core hold up the others of
        their process. But engines wait for students more than they work, so one of them counts as idle for the ranks:
        on two cores a step of the demo takes one rank of two threads 0.76 of what it takes one thread.
        """
        nodes, ranks = self.hardware.nodes, self.run.student.ranks
        if role == STUDENT and self.accelerator == GPU and self.run.student.offload != "none":
            return max(1, min(node.num_cpus // len(node.gpus) for node in nodes if node.gpus))
        if self.placement.num_gpus:
            return None
        slots, cores = max(1, self.placement.num_slots), self.hardware.num_cpus
        own = cores // slots
        if role == STUDENT:
            own = max(own, (cores - max(0, slots - ranks - 1)) // ranks)
        return max(1, min(MAX_THREADS, own))


def choose_accelerator(run: Run, hardware: Hardware) -> Accelerator:
    """Raises `ConfigError` where GPUs are asked for and there are none."""
    if run.accelerator == "auto":
        return GPU if hardware.num_gpus else CPU
    if run.accelerator == GPU and not hardware.num_gpus:
        raise ConfigError(
            f"accelerator: {GPU}, and there is no GPU ({hardware.describe()}). Check the driver, or write auto"
        )
    return run.accelerator
