"""What `--to kuberay` takes and sends: RayJob and NetworkPolicy (`kuberay.yaml.jinja`), the script inside
(`kuberay.sh.jinja`) and the bundle as a ConfigMap. Pure: the tests check every field against schemas, without a
cluster."""

from __future__ import annotations

import base64
import io
import shlex
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from configs.rules import teachers_by_place
from configs.section import Section
from launch.jobs import ending_file
from launch.targets.common import Python, Variable, WithEnvironment, ray_environment, render, train_command
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from configs.schema import Run
    from launch.bundle import Bundle

HOME = "/stillhouse"  # in every pod: bundle/ (what was sent, unpacked) and home/
ARCHIVE, SCRIPT = "bundle.zip", "run.sh"
GROUP_LABEL = "stillhouse.io/group"  # of Ray nodes: teachers, students
JOB_LABEL = "stillhouse.io/job"
MANAGED_BY = "app.kubernetes.io/managed-by=stillhouse"

CONFIG_MAP_LIMIT = 2**20
NAME_LIMIT = 47  # KubeRay's: it appends to the names of what it makes
DASHBOARD_PORT = 8265


Quantity = Annotated[str, Field(pattern=r"^[1-9]\d*(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]


class Toleration(Section):
    """As in a pod: of a taint that nodes of the group have."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Pod(Section):
    """What one pod gets, and on which machines it may run."""

    cpus: PositiveInt = 4
    memory: Quantity = Field("16Gi", description="What lies in /dev/shm counts.")
    gpus: NonNegativeInt = 0
    shm: Quantity = Field("4Gi", description="/dev/shm, where Ray keeps labels.")
    node_selector: dict[str, str] = Field({}, description="Labels of the machines.")
    tolerations: tuple[Toleration, ...] = ()


class Group(Pod):
    """Pods of one sort."""

    replicas: PositiveInt = 1


class Options(WithEnvironment):
    """What `--with` takes; `image` and `claim` are needed."""

    INSTEAD_OF_A_SECRET = "make it a Secret of the cluster and write secrets.{name}=its-name/its-key"

    image: str | None = Field(None, min_length=1, description="With the packages of Stillhouse, as docker/Dockerfile.")
    claim: Name | None = Field(None, description="PersistentVolumeClaim (ReadWriteMany): run folder and models.")
    mount: Annotated[str, Field(pattern=r"^/[A-Za-z0-9_./-]+$")] = Field("/shared", description="Where pods have it.")
    namespace: Name | None = Field(None, description="None: that of kubectl's context.")
    context: str | None = Field(None, min_length=1, description="Of kubectl.")
    head: Pod = Pod(cpus=4, memory="16Gi", shm="2Gi")
    teachers: Group = Group()
    students: Group = Group()
    gpu_resource: str = Field("nvidia.com/gpu", min_length=1)
    code: Literal["configmap", "image"] = Field("configmap", description="image: Stillhouse is installed in it.")
    python: Python = "python"
    grace_s: PositiveInt = Field(180, description="Time to save after a pod is told to end.")
    max_retries: NonNegativeInt = Field(2, description="New clusters after a failure; each resumes.")
    deadline_s: PositiveInt | None = Field(None, description="Of the whole RayJob.")
    network_policy: bool = True
    user_id: PositiveInt = 1000
    group_id: PositiveInt = 1000
    service_account: Name | None = None
    image_pull_secrets: tuple[Name, ...] = ()
    secrets: dict[Variable, Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")]] = Field(
        {}, description="Variables from Secrets: NAME: secret/key."
    )


def object_name(job: str) -> str:
    """Of every object of a job: a DNS label that starts with a letter."""
    name = job if job[0].isalpha() else f"run-{job}"
    return name if len(name) <= NAME_LIMIT else f"run-{name[-(NAME_LIMIT - 4) :].lstrip('-')}"


def objects(run: Run, options: Options, job: str) -> str:
    """RayJob and, unless it is switched off, NetworkPolicy, as YAML with comments."""
    worker = {
        "HOME": f"{HOME}/home",
        **({"PYTHONPATH": f"{HOME}/bundle/code"} if options.code == "configmap" else {}),
        **ray_environment(),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(options.grace_s),
    }
    head = worker | {"RAY_JOB_STOP_WAIT_TIME_S": str(options.grace_s)}
    return render(
        "kuberay.yaml.jinja",
        run=run,
        job=job,
        name=object_name(job),
        home=HOME,
        archive=ARCHIVE,
        dashboard_port=DASHBOARD_PORT,
        ray_version=version("ray"),
        variables={"ray-head": head | options.environment, "ray-worker": worker | options.environment},
        node_labels={group: {GROUP_LABEL: group, **_wanted(run, group)} for group in ("teachers", "students")},
        **options.model_dump(mode="json", exclude={"environment"}),
    )


def texts(run: Run, options: Options, job: str) -> dict[str, str]:
    """The script that the RayJob executes, beside Ray's head."""
    unplaced = [place for place, labels in _labels_of_roles(run).items() if not labels]  # they get their group's
    wanted = [f"--set={place}.placement.node_labels={{{GROUP_LABEL}: {_group(place)}}}" for place in unplaced]
    nodes = 1 + options.teachers.replicas + options.students.replicas
    train = shlex.join([options.python, *train_command(run, job), "--wait-for-nodes", str(nodes), *wanted])
    ending = str(ending_file(Path(run.folder or ""), job))
    return {SCRIPT: render("kuberay.sh.jinja", home=HOME, ending=ending, train=train)}


def archive(bundle: Bundle, texts: Mapping[str, str], *, with_code: bool) -> bytes:
    """The bundle as a zip; equal contents give equal bytes. Raises `ConfigError` where no ConfigMap can hold it."""
    sent = sorted(file.path for file in bundle.files if with_code or not file.path.startswith("code/"))
    contents = {name: (bundle.folder / name).read_bytes() for name in sent}
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name, content in (contents | dict(texts)).items():
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
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


def config_map(job: str, content: bytes) -> dict[str, object]:
    """As JSON values, for `kubectl create`."""
    labels = {**dict([MANAGED_BY.split("=")]), JOB_LABEL: job}
    data = {ARCHIVE: base64.b64encode(content).decode()}
    metadata = {"name": object_name(job), "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "binaryData": data}


def _labels_of_roles(run: Run) -> dict[str, Mapping[str, str]]:
    """The node labels that each role of the run asks for, by the role's place in the configuration."""
    found = {"student": run.student.placement.node_labels}
    for place, teacher in teachers_by_place(run).items():
        found |= {f"{place}.{name}": role.placement.node_labels for name, role in teacher.roles().items()}
    return found


def _group(place: str) -> str:
    return f"{place.split('.')[0]}s"


def _wanted(run: Run, group: str) -> dict[str, str]:
    """What the nodes of a group must be labelled with for the roles in it. Raises `ConfigError` for a contradiction."""
    wanted: dict[str, str] = {}
    for place, labels in _labels_of_roles(run).items():
        for key, value in labels.items() if _group(place) == group else ():
            if wanted.setdefault(key, value) != value:
                raise ConfigError(
                    f"{place}.placement.node_labels: {key}: {value} and another role of the group {group} asks for "
                    f"{wanted[key]}: write the same for both"
                )
    if wanted.get(GROUP_LABEL, group) != group:
        raise ConfigError(f"{GROUP_LABEL}: {wanted[GROUP_LABEL]} is asked for, and the group is {group}")
    return wanted
