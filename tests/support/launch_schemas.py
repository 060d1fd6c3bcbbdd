"""Schemas of what launch targets write, where no package brings one: KubeRay's RayJob and SkyPilot's task, each with
exactly the fields that we generate. A field that is not here is a misspelt one.

They were held against the real ones once, by hand, with the options `FULL` of the tests:
- RayJob: against the custom resource definitions of KubeRay v1.5.1 and v1.7.0, unknown fields refused; the file is
  helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of its repository (1.2 MB, hence not here);
- task: with `sky.Task.from_yaml` of skypilot 0.14.1 in an environment of its own (640 MB).
docs/kubernetes.md says how to do it again.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> Schema:
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _texts(pattern: str = "^[A-Za-z_~/][A-Za-z0-9_./~-]*$") -> Schema:
    return {"type": "object", "patternProperties": {pattern: {"type": "string"}}, "additionalProperties": False}


TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
LABELS = _texts(r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
DNS_NAME: Schema = {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$", "maxLength": 47}
POD_TEMPLATE = _object({"metadata": _object({"labels": LABELS}), "spec": {"type": "object"}})  # see kubernetes-validate

HEAD = _object(
    {
        "rayStartParams": _object({"num-cpus": {"const": "0"}, "dashboard-host": TEXT}),
        "template": POD_TEMPLATE,
    }
)
WORKERS = _object(
    {
        "groupName": {"enum": ["teachers", "students"]},
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "labels": LABELS,
        "rayStartParams": {"type": "object", "maxProperties": 0},
        "template": POD_TEMPLATE,
    }
)
RAY_JOB = _object(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": _object({"name": DNS_NAME, "labels": LABELS, "annotations": {"type": "object"}}),
        "spec": _object(
            {
                "entrypoint": TEXT,
                "jobId": TEXT,
                "shutdownAfterJobFinishes": {"const": True},
                "backoffLimit": {"type": "integer", "minimum": 0, "maximum": 10},
                "submitterPodTemplate": POD_TEMPLATE,
                "rayClusterSpec": _object(
                    {
                        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
                        "authOptions": _object({"mode": {"const": "token"}}),
                        "headGroupSpec": HEAD,
                        "workerGroupSpecs": {"type": "array", "items": WORKERS, "minItems": 2, "maxItems": 2},
                    }
                ),
            },
            {"activeDeadlineSeconds": {"type": "integer", "minimum": 1}},
        ),
    }
)

SKYPILOT_TASK = _object(
    {
        "name": TEXT,
        "num_nodes": {"type": "integer", "minimum": 1},
        "envs": _texts(),
        "secrets": {"type": "object", "additionalProperties": {"type": "null"}},
        "file_mounts": _texts(),
        "run": TEXT,
    },
    {
        "resources": _object(
            {},
            {
                "infra": TEXT,
                "accelerators": TEXT,
                "cpus": {"type": ["string", "integer"]},
                "memory": {"type": ["string", "integer"]},
                "disk_size": {"type": "integer"},
                "image_id": TEXT,
                "use_spot": {"type": "boolean"},
                "job_recovery": _object(
                    {
                        "max_restarts_on_errors": COUNT,
                        "recover_on_exit_codes": {"type": "array", "items": {"type": "integer", "maximum": 255}},
                    }
                ),
            },
        ),
        "volumes": _texts(),
        "setup": TEXT,
    },
)
