"""`--to kuberay`: a RayJob on Kubernetes, with a group of pods for the teachers and one for the students.

    bundle -> ConfigMap        run.yaml, prompts/, code/ and run.sh as one zip, unpacked in every pod
           -> RayJob           head (the run's own process), teachers, students; its pods go when the run is over
           -> NetworkPolicy    these pods reach each other; everything else reaches only the job API

Needs KubeRay 1.5.1 or newer, and a volume that all pods can write, for the run folder and the models. No secret is part
of what is sent: KubeRay makes the token, others are named: `--with secrets.HF_TOKEN=my-secret/token`. Kubernetes is
asked through kubectl alone.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.jobs import copy_results, run_status, visible_folder, waited_too_long
from launch.targets import OVER, JobRecord, JobStatus, Shipment, State, common, options_of, state_of
from launch.targets import kuberay_manifests as manifests
from launch.targets.kuberay_capacity import check_capacity
from launch.targets.kuberay_manifests import Options
from trainer.errors import ConfigError, InfrastructureError, Preempted, foreign_errors

if TYPE_CHECKING:
    from cluster.placement.memory.verdict import Offer
    from launch.bundle import Bundle

POLL_S = 2.0
STOP_MARGIN_S = 120
LOST = r"connection to the server|Unable to connect|refused|timed? ?out|no such host"
KINDS = "rayjobs.ray.io,configmaps,networkpolicies"

STATES: dict[str, State] = {"Running": "running", "Complete": "succeeded", "Failed": "failed"}
"""KubeRay's jobDeploymentStatus; any other is of a job that does not run yet."""


class Target:
    """See `launch.targets.Target`."""

    Options = Options

    def prepare(self, bundle: Bundle, options: Options, job: str) -> Shipment:
        missing = [name for name in ("image", "claim") if getattr(options, name) is None]
        if missing:
            lines = [f"  --with {name}=...: {Options.model_fields[name].description}" for name in missing]
            raise ConfigError("\n".join(["--to kuberay needs", *lines]))
        common.refuse_in_process(bundle.run, "kuberay")
        check_capacity(bundle.run, options)
        texts = manifests.texts(bundle.run, options, job)
        size = len(manifests.archive(bundle, texts, with_code=options.code == "configmap")) / 2**10
        note = (
            f"run.yaml, run.sh, prompts and code travel as {manifests.ARCHIVE} ({size:.0f} KiB) in the ConfigMap "
            f"{manifests.object_name(job)}. Not tried against a cluster by the tests of this project."
            f"{common.note_of_paths_outside(bundle.run, options.mount)}"
        )
        parts = [*(["code"] if options.code == "configmap" else []), "prompts", "run.yaml"]
        files = {"rayjob.yaml": manifests.objects(bundle.run, options, job), **texts}
        command = (*_kubectl(options), "create", "--filename", "-")
        return Shipment(files | common.parts_of(bundle, parts), command, note)

    def offer(self, options: Options) -> Offer:
        pods = [(group.replicas, group) for group in (options.teachers, options.students)]
        gpus = [_gpu_kind(group) for count, group in pods for _ in range(count * group.gpus)]
        memory = sum(count * common.bytes_of(group.memory) for count, group in [*pods, (1, options.head)])
        return common.offer_of("the pods", gpus, host_bytes=memory)

    def submit(self, bundle: Bundle, shipment: Shipment, options: Options, job: str) -> JobRecord:
        texts = {manifests.SCRIPT: str(shipment.files[manifests.SCRIPT])}
        content = manifests.archive(bundle, texts, with_code=options.code == "configmap")
        sent = f"{json.dumps(manifests.config_map(job, content))}\n---\n{shipment.files['rayjob.yaml']}"
        try:
            _run(*shipment.command, given=sent)
        except (ConfigError, InfrastructureError):
            with contextlib.suppress(ConfigError, InfrastructureError):  # the first error is the one to report
                _run(*_delete_command(options, job))
            raise
        return JobRecord.of(job, "kuberay", bundle, options, handle=manifests.object_name(job))

    def status(self, record: JobRecord) -> JobStatus:
        found = next(iter(_jobs(options_of(Target, record), f"{manifests.JOB_LABEL}={record.job}")), None)
        if found is None:
            return record.status("stopped", message="the RayJob was deleted")
        folder = visible_folder(record)
        if folder is None:
            return found
        written = run_status(folder, record.job)
        if not found.over or found.state == "stopped" or written.exit_code is None:
            return replace(found, step=written.step, steps=written.steps, pace=written.pace)
        return record.status(state_of(written.exit_code), written.exit_code, message=written.reason, written=written)

    def logs(self, record: JobRecord, *, follow: bool) -> Iterator[str]:
        """Of the pod that handed the job to Ray: it prints the run's output."""
        while follow and self.status(record).state == "pending":
            time.sleep(POLL_S)
        kubectl = _kubectl(options_of(Target, record))
        command = [*kubectl, "logs", *(["--follow"] if follow else []), f"job/{record.handle}"]
        try:
            output = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except FileNotFoundError:
            raise common.missing_command("kuberay", "kubectl") from None
        with output:
            assert output.stdout is not None
            yield from output.stdout
        if output.returncode:
            raise InfrastructureError(f"{shlex.join(command)} ended with exit code {output.returncode}: see above")

    def stop(self, record: JobRecord) -> None:
        """`ray job stop` in the head's pod, which has the run save and end; then everything of the job is deleted."""
        options = options_of(Target, record)
        delete = _delete_command(options, record.job)
        if self.status(record).state == "running":
            chosen = f"--selector=ray.io/node-type=head,{manifests.JOB_LABEL}={record.job}"
            for pod in _run(*_kubectl(options), "get", "pods", chosen, "--output=name").split()[:1]:
                dashboard = f"--address=http://127.0.0.1:{manifests.DASHBOARD_PORT}"
                ask = ["ray", "job", "stop", "--no-wait", dashboard, record.job]
                _run(*_kubectl(options), "exec", pod, "--container=ray-head", "--", *ask)
            seconds = options.grace_s + STOP_MARGIN_S
            if not common.wait_until(lambda: self.status(record).over, seconds=seconds, poll_s=POLL_S):
                instead = f"Delete it without a checkpoint: {shlex.join(delete)}"
                raise waited_too_long(record.job, seconds, instead=instead)
        _run(*delete)

    def list(self, options: Options) -> list[JobStatus]:
        return _jobs(options, manifests.MANAGED_BY)

    def fetch(self, record: JobRecord, destination: Path) -> None:
        folder = visible_folder(record)
        if folder is None:
            options = options_of(Target, record)
            command = shlex.join([*_kubectl(options), "cp", f"POD:{record.folder}", str(destination)])
            raise ConfigError(
                f"--to kuberay fetches nothing: {record.folder} is on the volume {options.claim}. From a pod that "
                f"mounts it: {command}"
            )
        copy_results(folder, destination)


def _jobs(options: Options, selector: str) -> list[JobStatus]:
    """RayJobs with a label. Raises `InfrastructureError` for an answer of another version of KubeRay."""
    text = _run(*_kubectl(options), "get", "rayjobs.ray.io", f"--selector={selector}", "--output=json")
    with foreign_errors("kubectl answers with what is no RayJob known here", error=InfrastructureError):
        return [_status(item) for item in json.loads(text)["items"]]


def _status(item: Mapping[str, Any]) -> JobStatus:
    metadata, status = item["metadata"], item.get("status", {})
    state = STATES.get(status.get("jobDeploymentStatus", ""), "pending")
    said = status.get("message", "")
    known = re.search(r"exit code (\d+)", said)  # KubeRay has no field for it
    code = 0 if state == "succeeded" else int(known[1]) if known and state in OVER else None
    if status.get("jobStatus") == "STOPPED" and state in OVER:
        state, code = "stopped", None
    elif code == Preempted.exit_code:
        state = "preempted"
    failed = status.get("failed") or 0
    parts = [said, f"{failed} failed so far" if failed and state not in OVER else ""]
    return JobStatus(
        job=metadata["labels"][manifests.JOB_LABEL],
        state=state,
        exit_code=code,
        message="; ".join(filter(None, parts)),
        name=metadata.get("annotations", {}).get("stillhouse.io/run", ""),
        submitted=datetime.fromisoformat(metadata["creationTimestamp"]).timestamp(),
    )


def _gpu_kind(pod: manifests.Pod) -> str:
    """As its node selector names it, by the labels of NVIDIA's operator and of GKE; "" where it does not."""
    labels = ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator")
    return next((pod.node_selector[label] for label in labels if label in pod.node_selector), "")


def _kubectl(options: Options) -> tuple[str, ...]:
    place = {"context": options.context, "namespace": options.namespace}
    return ("kubectl", *(f"--{name}={value}" for name, value in place.items() if value is not None))


def _delete_command(options: Options, job: str) -> tuple[str, ...]:
    chosen = f"--selector={manifests.JOB_LABEL}={job}"
    return (*_kubectl(options), "delete", KINDS, chosen, "--ignore-not-found", "--wait=false")


def _run(*command: str, given: str | None = None) -> str:
    """What kubectl prints. Raises as `run_command` does."""
    try:
        return common.run_command(*command, kind="kuberay", lost=LOST, given=given)
    except ConfigError as error:
        if re.search("no matches for kind|the server doesn't have a resource type", str(error)):
            raise ConfigError(f"{error}\nIs KubeRay installed in this cluster?") from None
        raise
