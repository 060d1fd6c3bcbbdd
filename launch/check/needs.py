"""What a run asks of the machines it runs on, for the questions of `cluster/preflight`."""

from __future__ import annotations

from cluster.lifecycle.ray_session import object_store_bytes
from cluster.placement.roles import rollouts_of, started_roles
from cluster.preflight.machine import Needs
from configs.engines import Vllm
from configs.load import run_folder
from configs.schema import Run
from launch.resolving import sent_bytes


def needs_of(run: Run) -> Needs:
    """What a run asks of a machine, as far as its configuration says."""
    teachers = run.teachers_by_name().values()
    engines = [one.engine for roles in started_roles(run).values() for one in roles.values()]
    engines += [] if (rollouts := rollouts_of(run)) is None else [rollouts.engine]
    sources = (*(teacher.model for teacher in teachers), run.student.model)
    return Needs(
        vllm=any(isinstance(engine, Vllm) for engine in engines),
        extras=tuple(dict.fromkeys(choice.extra for choice in run.trackers if choice.extra is not None)),
        models=tuple((source.path, source.revision) for source in sources),
        run_folder=str(run_folder(run).absolute()),
        object_store_bytes=object_store_bytes(run.training.max_label_bytes, weight_bytes=sent_bytes(run)),
    )
