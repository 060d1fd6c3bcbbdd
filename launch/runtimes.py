"""`runtime:` of a run: the machines it is resolved on, and the session that holds its roles there."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from cluster.in_process import InProcessSession
from cluster.lifecycle import nodes, ray_session
from cluster.placement.hardware import Hardware
from cluster.placement.resolve import Resolved
from cluster.prometheus import Exported
from cluster.session import RaySession
from cluster.students.group import StudentJob
from configs.schema import Run
from launch.resolving import resolve_run, sent_bytes
from trainer.errors import ConfigError
from trainer.loop.inputs import Inputs
from trainer.loop.job import Job
from trainer.protocols import Observer, Session


@dataclass(frozen=True)
class Runtime:
    """Where a run takes place."""

    resolved: Resolved
    cluster: ray_session.RayCluster | None  # None: in this process

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.resolved.warnings, *(self.cluster.warnings if self.cluster else ()))

    @property
    def start_timeout_s(self) -> float:
        """Of the slowest role."""
        return max(plan.start_timeout_s for plan in (self.resolved.student, *self.resolved.engines))

    def exported(self, run: Run, *, total_steps: int) -> Exported | None:
        """What the run's numbers are exported by; None where nobody could read them."""
        if self.cluster is None or (self.cluster.owned and run.report.prometheus_port is None):
            return None
        return Exported(run.name, total_steps=total_steps)

    def open_session(self, job: Job, observer: Observer) -> Session:
        """Starts nothing yet."""
        student = StudentJob(
            run=job.run,
            plan=self.resolved.student,
            vocabulary=job.inputs.vocabulary,
            total_steps=job.loop.total_steps,
        )
        if self.cluster is None:
            return InProcessSession(student, self.resolved, observer=observer)
        shared = not self.cluster.owned
        return RaySession(student, self.resolved, folder=job.folder, observer=observer, shared=shared)


def open_runtime(
    run: Run,
    inputs: Inputs,
    stack: contextlib.ExitStack,
    *,
    wait_for_nodes: int | None = None,
    with_students: bool = True,
) -> Runtime:
    """With `runtime: ray`, Ray is up afterwards and ends with the stack."""
    if wait_for_nodes is not None and (run.runtime == "in_process" or not os.environ.get("RAY_ADDRESS")):
        raise ConfigError(
            f"--wait-for-nodes {wait_for_nodes} waits for nodes of a Ray cluster, and none is named: set RAY_ADDRESS "
            "to the address of its head, and keep runtime: ray"
        )
    if run.runtime == "in_process":
        return Runtime(resolve_run(run, inputs, Hardware.local(), with_students=with_students), None)
    if os.environ.get("RAY_ADDRESS"):
        cluster = ray_session.start_ray(num_cpus=0)
        stack.callback(ray_session.stop_ray, cluster)
        if wait_for_nodes is not None:
            nodes.wait_for_nodes(
                wait_for_nodes,
                timeout_s=run.faults.start_timeout_s or nodes.JOIN_TIMEOUT_S,
                note=lambda text: print(text, flush=True),
            )
        return Runtime(resolve_run(run, inputs, Hardware.of_ray(), with_students=with_students), cluster)
    resolved = resolve_run(run, inputs, Hardware.local(), with_students=with_students)
    store = ray_session.object_store_bytes(run.training.max_label_bytes, weight_bytes=sent_bytes(run))
    cluster = ray_session.start_ray(
        num_cpus=resolved.placement.num_slots,
        object_store_bytes=store,
        metrics_port=run.report.prometheus_port,
    )
    stack.callback(ray_session.stop_ray, cluster)
    return Runtime(resolved, cluster)
