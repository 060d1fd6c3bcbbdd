"""What `--to kuberay` sends, as values: RayJob, NetworkPolicy and ConfigMap. Pure, so that the tests can hold every
field against schemas without a cluster."""

from __future__ import annotations

import base64
import io
import shlex
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from cluster.ray_session import RAY_SETTINGS
from configs.schema import Run
from launch.bundle import COMMAND, Bundle
from launch.commented_yaml import Note, dump
from launch.targets.kuberay_options import Group, Options
from trainer.errors import ConfigError

HOME = "/stillhouse"  # in every pod: bundle/ (what was sent, unpacked) and home/
ARRIVES_AT = "/stillhouse-sent"
ARCHIVE, SCRIPT = "bundle.zip", "run.sh"

GROUP_LABEL = "stillhouse.io/group"  # of Ray nodes and of pods: teachers, students
JOB_LABEL = "stillhouse.io/job"
MANAGED_BY = {"app.kubernetes.io/managed-by": "stillhouse"}
RUN_NOTE, FOLDER_NOTE = "stillhouse.io/run", "stillhouse.io/folder"

CONFIG_MAP_LIMIT = 2**20
NAME_LIMIT = 47  # KubeRay's: it appends to the names of what it makes
END_MARGIN_S = 60
DASHBOARD_PORT = 8265


def object_name(job: str) -> str:
    """Of every object of a job: a DNS label that starts with a letter."""
    name = job if job[0].isalpha() else f"run-{job}"
    return name if len(name) <= NAME_LIMIT else f"run-{name[-(NAME_LIMIT - 4) :].lstrip('-')}"


def manifests(run: Run, options: Options, job: str) -> str:
    """RayJob and, unless it is switched off, NetworkPolicy, as YAML with comments."""
    objects = [_ray_job(run, options, job)]
    if options.network_policy:
        objects.append(_network_policy(job))
    header = f"Run {run.name} on Kubernetes. Written by `stillhouse submit --to kuberay`; needs KubeRay 1.5.1 or newer."
    return dump(*objects, header=header)


def script(run: Run, options: Options, job: str) -> str:
    """What the RayJob executes, beside Ray's head."""
    wanted = [f"--set={place}.placement.node_labels={{{GROUP_LABEL}: {group}}}" for place, group in _unplaced(run)]
    nodes = 1 + options.teachers.replicas + options.students.replicas
    train = shlex.join([options.python, *COMMAND, "--wait-for-nodes", str(nodes), *wanted])
    verdict = shlex.quote(f"{run.folder}/submissions/{job}/exit_code")
    return f"""#!/bin/bash
# The run itself. KubeRay starts a job again after any failure, whatever its exit code: what another start cannot mend
# (2 configuration, 3 data, 5 diverged), or what is done, is noted on the volume and ends at once the next time.
set -u
umask 077
trap : TERM INT   # Ray signals every process of a job: the run saves and ends, and this shell passes its code on
cd {HOME}/bundle || exit 2
verdict={verdict}
if [[ -s "$verdict" ]]; then
    echo "this job has ended with exit code $(cat "$verdict") before: not started again"
    exit "$(cat "$verdict")"
fi
{train}
code=$?
case $code in
    0 | 2 | 3 | 5) mkdir -p "$(dirname "$verdict")" && echo "$code" > "$verdict" ;;
esac
exit "$code"
"""


def archive(bundle: Bundle, texts: Mapping[str, str], *, with_code: bool) -> bytes:
    """The bundle as a zip; equal contents give equal bytes. Raises `ConfigError` where no ConfigMap can hold it."""
    skipped = () if with_code else ("code/",)
    names = [f.path for f in bundle.files if not f.path.endswith(".whl") and not f.path.startswith(skipped or "\0")]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name in sorted(names):
            packed.writestr(zipfile.ZipInfo(name), (bundle.folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
        for name, text in sorted(texts.items()):
            packed.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
        sizes = sorted(((info.compress_size, info.filename) for info in packed.infolist()), reverse=True)
    content = target.getvalue()
    if len(content) > CONFIG_MAP_LIMIT:
        largest = "\n".join(f"  {size / 2**10:8.0f} KiB  {name}" for size, name in sizes[:5])
        raise ConfigError(
            f"what has to travel packs to {len(content) / 2**10:.0f} KiB, and a ConfigMap of Kubernetes holds "
            f"{CONFIG_MAP_LIMIT / 2**10:.0f}; largest:\n{largest}\nPut the rows on the volume and name that place "
            "with --shared FOLDER, or put the code into the image and write --with code=image"
        )
    return content


def config_map(job: str, content: bytes) -> dict[str, Any]:
    """As JSON values, for `kubectl create`."""
    data = base64.b64encode(content).decode()
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job), "binaryData": {ARCHIVE: data}}


# --- the pieces -------------------------------------------------------------------------------------------------------


def _metadata(job: str) -> dict[str, Any]:
    return {"name": object_name(job), "labels": {**MANAGED_BY, JOB_LABEL: job}}


def _ray_job(run: Run, options: Options, job: str) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "entrypoint": f"bash {HOME}/bundle/{SCRIPT}",
        "jobId": job,
        "shutdownAfterJobFinishes": Note("what the run leaves is on the volume; the machines are given back", True),
        "backoffLimit": Note(
            "any failure counts: KubeRay knows no exit codes. run.sh ends at once where a new start is of no use",
            options.max_retries,
        ),
    }
    if options.deadline_s is not None:
        spec["activeDeadlineSeconds"] = options.deadline_s
    spec |= {
        "submitterPodTemplate": {
            "metadata": {"labels": {**MANAGED_BY, JOB_LABEL: job}},
            "spec": _submitter(options),
        },
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": Note(
                "KubeRay makes a token, keeps it in a Secret and hands it to the pods", {"mode": "token"}
            ),
            "headGroupSpec": _head(options, job),
            "workerGroupSpecs": [
                _workers("teachers", options.teachers, _labels_wanted(run, "teacher"), options, job),
                _workers("students", options.students, _labels_wanted(run, "student"), options, job),
            ],
        },
    }
    notes = {RUN_NOTE: run.name, FOLDER_NOTE: str(run.folder)}
    metadata = {**_metadata(job), "annotations": notes}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _head(options: Options, job: str) -> dict[str, Any]:
    ports = {"gcs-server": 6379, "dashboard": DASHBOARD_PORT, "client": 10001}
    container = _ray_container("ray-head", options.head, options, {"RAY_JOB_STOP_WAIT_TIME_S": str(options.grace_s)})
    container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    return {
        "rayStartParams": {
            "num-cpus": Note("the run's own process is here, and no role", "0"),
            "dashboard-host": Note("KubeRay asks it how the job is; the token guards it", "0.0.0.0"),
        },
        "template": _template(options.head, options, job, container),
    }


def _workers(name: str, group: Group, wanted: Mapping[str, str], options: Options, job: str) -> dict[str, Any]:
    return {
        "groupName": name,
        "replicas": group.replicas,
        "minReplicas": group.replicas,
        "maxReplicas": group.replicas,
        "labels": Note("of the Ray nodes: the run places its roles by them", {GROUP_LABEL: name, **wanted}),
        "rayStartParams": {},
        "template": _template(group, options, job, _ray_container("ray-worker", group, options, {})),
    }


def _template(group: Any, options: Options, job: str, container: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": Note(
            f"a pod that is taken away announces it to Ray, and the run has {options.grace_s} s to save",
            options.grace_s + END_MARGIN_S,
        ),
        **_pod_identity(options),
    }
    if group.node_selector:
        spec["nodeSelector"] = dict(group.node_selector)
    if group.tolerations:
        spec["tolerations"] = [toleration.model_dump(exclude_none=True) for toleration in group.tolerations]
    spec |= {
        "initContainers": [_unpack(options)],
        "containers": [container],
        "volumes": [
            {"name": "sent", "configMap": {"name": object_name(job)}},
            {"name": "work", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": group.shm}},
            {"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}},
        ],
    }
    return {"metadata": {"labels": {**MANAGED_BY, JOB_LABEL: job}}, "spec": spec}


def _ray_container(name: str, group: Any, options: Options, more: Mapping[str, str]) -> dict[str, Any]:
    amounts = {"cpu": str(group.cpus), "memory": group.memory}
    if group.gpus:
        amounts[options.gpu_resource] = str(group.gpus)
    plain = {
        "HOME": f"{HOME}/home",
        **({"PYTHONPATH": f"{HOME}/bundle/code"} if options.code == "configmap" else {}),
        **{key: value for key, value in RAY_SETTINGS.items() if key != "RAY_AUTH_MODE"},  # KubeRay's to set
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(options.grace_s),
        **more,
        **options.environment,
    }
    secret = [
        {"name": key, "valueFrom": {"secretKeyRef": dict(zip(("name", "key"), place.split("/"), strict=True))}}
        for key, place in options.secrets.items()
    ]
    return {
        "name": name,
        "image": options.image,
        "securityContext": _container_limits(),
        "env": [{"name": key, "value": value} for key, value in plain.items()] + secret,
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "volumeMounts": [
            {"name": "work", "mountPath": HOME},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "shared", "mountPath": options.mount},
        ],
    }


def _unpack(options: Options) -> dict[str, Any]:
    unpack = f"mkdir -p {HOME}/home && {options.python} -m zipfile -e {ARRIVES_AT}/{ARCHIVE} {HOME}/bundle"
    small = {"cpu": "200m", "memory": "256Mi"}
    return {
        "name": "unpack",
        "image": options.image,
        "command": ["/bin/sh", "-c", unpack],
        "securityContext": _container_limits(),
        "resources": {"requests": small, "limits": dict(small)},
        "volumeMounts": [
            {"name": "sent", "mountPath": ARRIVES_AT, "readOnly": True},
            {"name": "work", "mountPath": HOME},
        ],
    }


def _submitter(options: Options) -> dict[str, Any]:
    """The pod that hands the job to Ray; KubeRay adds its command."""
    container = {
        "name": "ray-job-submitter",
        "image": options.image,
        "securityContext": _container_limits(),
        "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    }
    return {"restartPolicy": "Never", **_pod_identity(options), "containers": [container]}


def _pod_identity(options: Options) -> dict[str, Any]:
    identity: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": options.user_id,
            "runAsGroup": options.group_id,
            "fsGroup": options.group_id,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if options.service_account is not None:
        identity["serviceAccountName"] = options.service_account
    if options.image_pull_secrets:
        identity["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    return identity


def _container_limits() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _network_policy(job: str) -> dict[str, Any]:
    own = {"matchLabels": {JOB_LABEL: job}}
    spec = {
        "podSelector": own,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": own}]},
            {"ports": Note("the job API, for KubeRay", [{"protocol": "TCP", "port": DASHBOARD_PORT}])},
        ],
    }
    kind = Note("what engines and ranks say to each other is not encrypted and asks for no password", "NetworkPolicy")
    return {"apiVersion": "networking.k8s.io/v1", "kind": kind, "metadata": _metadata(job), "spec": spec}


# --- who sits where ---------------------------------------------------------------------------------------------------


def _seats(run: Run) -> dict[str, Mapping[str, str]]:
    """The node labels that each role of the run asks for, by the role's place in the configuration."""
    found = {"student": run.student.placement.node_labels}
    found |= {f"teacher.{role}": replicas.placement.node_labels for role, replicas in run.teacher.roles().items()}
    return found


def _unplaced(run: Run) -> list[tuple[str, str]]:
    """(place in the configuration, group) of the roles that ask for no labels: they get the group's."""
    return [(place, f"{place.split('.')[0]}s") for place, labels in _seats(run).items() if not labels]


def _labels_wanted(run: Run, kind: str) -> dict[str, str]:
    """What the nodes of a group must be labelled with for the roles in it. Raises `ConfigError` for a contradiction."""
    wanted: dict[str, str] = {}
    for place, labels in _seats(run).items():
        if place.split(".")[0] != kind:
            continue
        for key, value in labels.items():
            if wanted.setdefault(key, value) != value:
                raise ConfigError(
                    f"{place}.placement.node_labels: {key}: {value} and another role of the group {kind}s asks for "
                    f"{wanted[key]}: write the same for both"
                )
    if wanted.get(GROUP_LABEL, f"{kind}s") != f"{kind}s":
        raise ConfigError(f"{GROUP_LABEL}: {wanted[GROUP_LABEL]} is asked for, and {kind}s sit in the group {kind}s")
    return wanted
