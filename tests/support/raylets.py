"""A Ray cluster of several nodes on this machine, each a raylet of its own that a test may kill, drain or add."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fake_gpus import ray_folder

from cluster.lifecycle import ray_session

OBJECT_STORE_BYTES = 80 * 2**20
NODE_TIMEOUT_S = 180


class Raylets:
    """The cluster and its nodes by name."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str = cluster.address
        self._nodes: dict[str, Any] = {}

    def add(self, name: str, *, slots: int = 1, **labels: str) -> None:
        labels = {"name": name, **labels}
        self._nodes[name] = self._cluster.add_node(
            wait=False, num_cpus=slots, labels=labels, object_store_memory=OBJECT_STORE_BYTES
        )
        self._cluster.wait_for_nodes(timeout=NODE_TIMEOUT_S)

    def node_id(self, name: str) -> str:
        return self._nodes[name].node_id

    def name_of(self, node_id: str) -> str:
        return next((name for name, node in self._nodes.items() if node.node_id == node_id), "head")

    def kill(self, name: str) -> None:
        """End a node as a power cut does: its raylet is killed, and its workers follow."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def drain(self, name: str, *, seconds: float) -> None:
        """Notice that a node will be taken away; Ray itself then does nothing more."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        client = GcsClient(address=self.address)
        deadline_ms = int((time.time() + seconds) * 1000)
        accepted, why = client.drain_node(
            self.node_id(name), DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot notice", deadline_ms
        )
        assert accepted, why

    def actor_names(self) -> list[str]:
        """Of every actor that lives on the cluster and has a name."""
        import ray

        joined = ray_session.start_ray(num_cpus=0, address=self.address)
        try:
            return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        finally:
            ray_session.stop_ray(joined)


@contextlib.contextmanager
def raylets(nodes: Mapping[str, Mapping[str, str]]) -> Iterator[Raylets]:
    """A head without slots and the named nodes with a slot each and their labels. RAY_ADDRESS leads there meanwhile."""
    with ray_cluster(num_cpus=0) as (cluster, patch):
        made = Raylets(cluster)
        for name, labels in nodes.items():
            made.add(name, **labels)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made


@contextlib.contextmanager
def ray_cluster(**head: Any) -> Iterator[tuple[Any, pytest.MonkeyPatch]]:
    """Ray's own `Cluster` with a head, shut down whatever happens, and what changes its environment meanwhile."""
    import ray
    from ray.cluster_utils import Cluster

    with ray_folder() as (_, patch):
        small = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args={**small, **head})
        try:
            yield cluster, patch
        finally:
            connected = ray.is_initialized()
            ray.shutdown()
            cluster.shutdown()
            assert not connected, "a test stayed connected"
