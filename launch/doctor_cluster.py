"""`python -m launch.doctor_cluster`: the doctor's part that joins a cluster, in a process of its own.

Joining may hang inside Ray without a message (a machine that is no node of the cluster, a network that drops packets),
where no deadline of ours reaches. So this is a child that can be killed: a question as JSON on stdin, findings as lines
of JSON on what was stdout, and whatever libraries print on stderr.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from cluster.preflight.finding import Finding, problem
from trainer.errors import StillhouseError


def main() -> None:
    question = json.loads(sys.stdin.readline())
    findings = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(where: str, finding: Finding) -> None:
        findings.write(json.dumps({"where": where, **asdict(finding)}) + "\n")

    from cluster.lifecycle.ray_session import start_ray, stop_ray
    from cluster.preflight.members import CLUSTER, Asked, examine_members

    try:
        cluster = start_ray(num_cpus=0, address=question["address"])
    except StillhouseError as error:
        text, _, advice = str(error).partition(". ")
        say(CLUSTER, problem("joining", text, advice or "check the address"))
        return
    import ray

    context = ray.get_runtime_context()
    say(CLUSTER, Finding("ok", "joining", f"joined {cluster.address} from node {context.get_node_id()[:8]}"))
    asked = Asked(
        run_folder=question["run_folder"],
        disk_bytes=question["disk_bytes"],
        models=tuple((path, revision) for path, revision in question["models"]),
        needs_vllm=question["needs_vllm"],
    )
    dashboard_url = ray._private.worker.global_worker.node.webui_url or None
    for where, finding in examine_members(asked, dashboard_url=dashboard_url, warnings=cluster.warnings):
        say(where, finding)
    stop_ray(cluster)


if __name__ == "__main__":
    main()
