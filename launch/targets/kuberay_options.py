"""What `--to kuberay` takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from configs.section import Section
from launch.targets.common import Python, Variable, WithEnvironment

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
    grace_s: PositiveInt = Field(180, description="A pod that is taken away leaves the run so long to save.")
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
