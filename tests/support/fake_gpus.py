"""A real Ray with GPUs that do not exist, handed out as real ones, and actors that tell what they were given."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import runtime
from cluster.lifecycle import ray_session
from cluster.placement.groups import Placement
from cluster.placement.reserve import PlacedGroups, actor_options, create_groups
from cluster.placement.topology import number_ranks
from cluster.runtime import GPU, SCORER, STUDENT, RankPlace, environment

ANSWER_TIMEOUT_S = 280.0
KEYS = (
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "RANK",
    "OMP_NUM_THREADS",
    "MALLOC_TOP_PAD_",
    "DS_ACCELERATOR",
)


class Witness:
    """An actor that tells what it was given."""

    def where(self) -> tuple[str, tuple[str, ...]]:
        import ray

        context = ray.get_runtime_context()
        return context.get_node_id(), tuple(context.get_accelerator_ids()["GPU"])

    def take(self, place: RankPlace, world: int) -> None:
        os.environ.update(runtime.student_environment(place, world=world, address="127.0.0.1", port=1234))

    def environment(self) -> dict[str, str | None]:
        return {key: os.environ.get(key) for key in KEYS}


@contextlib.contextmanager
def ray_folder() -> Iterator[tuple[Path, pytest.MonkeyPatch]]:
    """A folder short enough for Ray's sockets, with Ray's variables set as a run sets them, and put back."""
    folder = Path(tempfile.mkdtemp(prefix="sh-"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("RAY_ADDRESS", raising=False)
            patch.setenv("XDG_CACHE_HOME", str(folder))
            patch.setenv("RAY_TMPDIR", str(folder))  # where a cluster announces itself, too
            patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # actors import this file
            for name, value in ray_session.ray_environment(memory_bytes=0).items():
                patch.setenv(name, value)
            ray_session.reread_ray_environment()
            yield folder, patch
    finally:
        ray_session.reread_ray_environment()
        shutil.rmtree(folder, ignore_errors=True)


def spawn(groups: PlacedGroups) -> tuple[list, list]:
    """Student actors and teacher actors, in the groups."""
    import ray

    actor = ray.remote(Witness)
    (student,) = groups.of_role(STUDENT)
    table = environment(STUDENT, GPU)
    ranks = [
        actor.options(**actor_options(student, environment=table, bundle=index)).remote()
        for index in range(len(student.group.bundles))
    ]
    table = environment(SCORER, GPU)
    teachers = [actor.options(**actor_options(group, environment=table)).remote() for group in groups.of_role(SCORER)]
    return ranks, teachers


def run_roles(
    placement: Placement,
) -> tuple[list[RankPlace], list[dict], list[tuple[str, tuple[str, ...]]], list[dict]]:
    """Rank places, environments of ranks in rank order, places and environments of teachers."""
    import ray

    groups = asyncio.run(create_groups(placement, timeout_s=60))
    try:
        ranks, teachers = spawn(groups)
        where = ray.get([rank.where.remote() for rank in ranks], timeout=ANSWER_TIMEOUT_S)
        places = number_ranks([(index, node, gpus) for index, (node, gpus) in enumerate(where)])
        ray.get([ranks[p.actor].take.remote(p, len(ranks)) for p in places], timeout=ANSWER_TIMEOUT_S)
        rank_tables = ray.get([ranks[p.actor].environment.remote() for p in places], timeout=ANSWER_TIMEOUT_S)
        teacher_places = ray.get([teacher.where.remote() for teacher in teachers], timeout=ANSWER_TIMEOUT_S)
        teacher_tables = ray.get([teacher.environment.remote() for teacher in teachers], timeout=ANSWER_TIMEOUT_S)
        rank_gpus = {
            (where[p.actor][0], table["CUDA_VISIBLE_DEVICES"]) for p, table in zip(places, rank_tables, strict=True)
        }
        teacher_gpus = [(node, gpu) for node, gpus in teacher_places for gpu in gpus]
        assert len(rank_gpus) == len(ranks), "two ranks hold one GPU"
        assert len(set(teacher_gpus)) == len(teacher_gpus)
        assert not rank_gpus & set(teacher_gpus), "a teacher and a rank hold one GPU"
        return places, rank_tables, teacher_places, teacher_tables
    finally:
        groups.release()
